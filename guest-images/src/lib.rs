//! Where the built guest kernel lies.
