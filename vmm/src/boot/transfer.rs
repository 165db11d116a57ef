//! Migration of the boot payload: implements the engine's `BootSource` and `BootSink`. Created by the
//! supervisor for one migration each; [`super::payload`] owns the files.

use super::payload::store::PayloadStore;
use super::payload::{BootPayload, FileIdentity, PayloadError, Role};
use crate::error::guest_error;
use migration::boot::{BootSink, BootSource, FileRole, Identity};
use migration::destination::GoOn;
use migration::guest::GuestError;
use std::io;
use std::sync::{Arc, Mutex};

impl From<Role> for FileRole {
    fn from(role: Role) -> Self {
        match role {
            Role::Kernel => Self::Kernel,
            Role::Initrd => Self::Initrd,
            Role::Module => Self::Module,
        }
    }
}

impl From<FileRole> for Role {
    fn from(role: FileRole) -> Self {
        match role {
            FileRole::Kernel => Self::Kernel,
            FileRole::Initrd => Self::Initrd,
            FileRole::Module => Self::Module,
        }
    }
}

fn failed(error: PayloadError) -> GuestError {
    guest_error(&error)
}

/// At the source: the files that were opened at the start or received. None if they cannot be sent; the
/// guest can then not be reset at the destination, unless that has a kernel of its own.
pub struct LeavingFiles(pub Option<Arc<BootPayload>>);

impl BootSource for LeavingFiles {
    fn identities(&mut self, go_on: GoOn<'_>) -> Result<Vec<Identity>, GuestError> {
        let Some(payload) = &self.0 else { return Ok(Vec::new()) };
        let identities = match payload.identities(go_on) {
            Err(error @ PayloadError::Changed { .. }) => {
                // No reason to keep a running guest here.
                log::warn!(
                    "the guest moves without its boot files and cannot be reset there: {error}"
                );
                self.0 = None;
                return Ok(Vec::new());
            }
            result => result.map_err(failed)?,
        };
        let identity = |FileIdentity { len_bytes, sha256, role, arguments }| Identity {
            role: FileRole::from(role),
            len_bytes,
            sha256,
            arguments,
        };
        Ok(identities.into_iter().map(identity).collect())
    }

    fn read_at(&self, file: usize, offset_bytes: u64, into: &mut [u8]) -> io::Result<()> {
        let payload = self.0.as_ref().ok_or(io::ErrorKind::NotFound)?;
        payload.read_at(file, offset_bytes, into)
    }
}

/// At the destination: known files, and the store for the others.
pub struct ArrivingFiles {
    known: Option<Arc<BootPayload>>,
    store: Option<PayloadStore>,
    /// Receives the complete payload.
    arrived: Arc<Mutex<Option<BootPayload>>>,
}

impl ArrivingFiles {
    /// Reuses `known` files; puts the complete payload into `arrived`.
    pub fn new(known: Option<Arc<BootPayload>>, arrived: Arc<Mutex<Option<BootPayload>>>) -> Self {
        Self { known, store: None, arrived }
    }

    fn store(&mut self) -> Result<&mut PayloadStore, GuestError> {
        self.store.as_mut().ok_or_else(|| GuestError::new("boot files that were not announced"))
    }
}

impl BootSink for ArrivingFiles {
    fn announce(
        &mut self,
        identities: Vec<Identity>,
        go_on: GoOn<'_>,
    ) -> Result<Vec<usize>, GuestError> {
        if identities.is_empty() {
            return Ok(Vec::new());
        }
        let identity = |Identity { role, len_bytes, sha256, arguments }| FileIdentity {
            len_bytes,
            sha256,
            role: Role::from(role),
            arguments,
        };
        let identities = identities.into_iter().map(identity).collect();
        let known: Vec<&BootPayload> = self.known.iter().map(|known| &**known).collect();
        let store = PayloadStore::new(identities, &known, go_on).map_err(failed)?;
        let missing = store.missing();
        self.store = Some(store);
        Ok(missing)
    }

    fn write(&mut self, file: usize, offset_bytes: u64, bytes: &[u8]) -> Result<(), GuestError> {
        self.store()?.write(file, offset_bytes, bytes).map_err(failed)
    }

    fn finish(&mut self) -> Result<(), GuestError> {
        if let Some(store) = self.store.take() {
            let payload = store.finish().map_err(failed)?;
            *devices::lock(&self.arrived) = Some(payload);
        }
        Ok(())
    }
}
