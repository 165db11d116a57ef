//! The handshake, until a client has chosen an export. The caller's deadline is for all of it.

use super::exports::{Context, Exported, Exports};
use super::stream::Stream;
use crate::block::SECTOR_BYTES;
use crate::block::nbd::protocol::{
    BlockSizes, CLIENT_FIXED_NEWSTYLE, CLIENT_NO_ZEROES, EXPORT_NAME_ZEROES, FLAG_FIXED_NEWSTYLE,
    FLAG_NO_ZEROES, Fields, Greeting, Info, InfoRequest, MAX_OPTION_BYTES, MAX_PAYLOAD_BYTES,
    MetaContext, MetaRequest, OptionHeader, OptionReply, ProtocolError, ServerEntry,
    encode_export_name_reply, info, option, reply,
};
use std::io;
use std::sync::Arc;

/// Most options of a handshake: a client that looks at every export sends a few for each.
const MAX_OPTIONS: usize = 4 * super::MAX_EXPORTS;
/// Preferred size of requests: a page.
const PREFERRED_BYTES: u32 = 4096;
/// A node is accessed by whole sectors, and so are exports: other requests are refused.
pub const MIN_BLOCK_BYTES: u32 = 512;
const _: () = assert!(MIN_BLOCK_BYTES as u64 == SECTOR_BYTES);

/// How a handshake has ended.
pub enum Outcome {
    /// The client has gone.
    Aborted,
    /// The client has chosen an export.
    Chosen(Chosen),
}

/// What a client has chosen.
pub struct Chosen {
    pub export: Arc<Exported>,
    /// Whether replies are structured.
    pub structured: bool,
    /// What block status tells of, with their ids.
    pub contexts: Vec<(u32, Context)>,
}

/// A handshake as far as it has come.
struct Handshake<'a, E> {
    stream: &'a mut Stream,
    exports: &'a Exports,
    enter: E,
    no_zeroes: bool,
    structured: bool,
    /// Name of the export that they are of, and the contexts.
    contexts: (String, Vec<(u32, Context)>),
}

fn broken(why: ProtocolError) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, why)
}

fn invalid(why: String) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, why)
}

/// Has the client choose an export, which it uses from the moment that `enter` returns it.
///
/// # Errors
/// If the client breaks the protocol, leaves or takes too long.
pub fn run(
    stream: &mut Stream,
    exports: &Exports,
    enter: impl Fn(&str) -> Option<Arc<Exported>>,
) -> io::Result<Outcome> {
    let greeting = Greeting { flags: FLAG_FIXED_NEWSTYLE | FLAG_NO_ZEROES };
    stream.output.send(&greeting.encode(), &[])?;
    let flags = stream.input.array::<4>()?;
    let flags = Fields::new("the client's flags", &flags).u32().map_err(broken)?;
    if flags & !(CLIENT_FIXED_NEWSTYLE | CLIENT_NO_ZEROES) != 0 {
        return Err(invalid(format!("unknown client flags {flags:#x}")));
    }
    let no_zeroes = flags & CLIENT_NO_ZEROES != 0;
    let contexts = (String::new(), Vec::new());
    let mut handshake =
        Handshake { stream, exports, enter, no_zeroes, structured: false, contexts };
    for _ in 0..MAX_OPTIONS {
        if let Some(outcome) = handshake.option()? {
            return Ok(outcome);
        }
    }
    Err(invalid(format!("more than {MAX_OPTIONS} options")))
}

impl<E: Fn(&str) -> Option<Arc<Exported>>> Handshake<'_, E> {
    /// Serves the next option.
    fn option(&mut self) -> io::Result<Option<Outcome>> {
        if self.stream.input.at_end()? {
            return Ok(Some(Outcome::Aborted));
        }
        let OptionHeader { option, len } =
            OptionHeader::decode(&self.stream.input.array()?).map_err(broken)?;
        if len > MAX_OPTION_BYTES {
            return Err(invalid(format!("an option of {len} bytes")));
        }
        let mut data = vec![0; usize::try_from(len).map_err(io::Error::other)?];
        self.stream.input.receive(&mut data)?;
        match option {
            option::EXPORT_NAME => return self.export_name(&data).map(Some),
            option::ABORT => {
                // It need not wait for the reply.
                let _ = self.reply(option, reply::ACK, &[]);
                return Ok(Some(Outcome::Aborted));
            }
            option::LIST | option::STRUCTURED_REPLY if len != 0 => {
                self.refuse(option, reply::ERR_INVALID, "the option has no data")?;
            }
            option::LIST => self.list()?,
            option::STRUCTURED_REPLY => {
                self.structured = true;
                self.reply(option, reply::ACK, &[])?;
            }
            option::INFO | option::GO => return self.info(option, &data),
            option::LIST_META_CONTEXT | option::SET_META_CONTEXT => {
                self.meta_contexts(option, &data)?;
            }
            _ => self.refuse(option, reply::ERR_UNSUP, "the option is not supported")?,
        }
        Ok(None)
    }

    fn reply(&self, option: u32, kind: u32, data: &[u8]) -> io::Result<()> {
        let len = u32::try_from(data.len()).map_err(io::Error::other)?;
        self.stream.output.send(&OptionReply { option, kind, len }.encode(), data)
    }

    fn refuse(&self, option: u32, kind: u32, why: &str) -> io::Result<()> {
        self.reply(option, kind, why.as_bytes())
    }

    fn list(&self) -> io::Result<()> {
        for (name, description) in self.exports.list() {
            let entry = ServerEntry { name, description };
            self.reply(option::LIST, reply::SERVER, &entry.encode())?;
        }
        self.reply(option::LIST, reply::ACK, &[])
    }

    fn chosen(&mut self, export: Arc<Exported>) -> Outcome {
        let (name, mut contexts) = std::mem::take(&mut self.contexts);
        // Those of another export tell nothing of this one.
        if name != export.name {
            contexts.clear();
        }
        Outcome::Chosen(Chosen { export, structured: self.structured, contexts })
    }

    fn export_name(&mut self, data: &[u8]) -> io::Result<Outcome> {
        let name = Fields::new("an export's name", data).rest_as_string().map_err(broken)?;
        // The option has no way to refuse.
        let Some(export) = (self.enter)(&name) else {
            return Err(invalid(format!("there is no export named {name:?}")));
        };
        let zeroes = [0; EXPORT_NAME_ZEROES];
        let zeroes = if self.no_zeroes { &[] } else { &zeroes[..] };
        let facts = export.facts();
        let (len_bytes, flags) = (facts.len_bytes, facts.flags(self.structured));
        let chosen = self.chosen(export);
        // A client that is gone by now is noticed by who serves it, and leaves the export there.
        let _ = self.stream.output.send(&encode_export_name_reply(len_bytes, flags), zeroes);
        Ok(chosen)
    }

    fn info(&mut self, option: u32, data: &[u8]) -> io::Result<Option<Outcome>> {
        let wanted = match InfoRequest::decode(data) {
            Ok(request) => request,
            Err(error) => {
                self.refuse(option, reply::ERR_INVALID, &error.to_string())?;
                return Ok(None);
            }
        };
        let Some(export) = self.exports.find(&wanted.export) else {
            self.unknown(option, &wanted.export)?;
            return Ok(None);
        };
        let flags = export.flags(self.structured);
        let mut infos = vec![Info::Export { len_bytes: export.len_bytes, flags }];
        if wanted.wanted.contains(&info::NAME) {
            infos.push(Info::Name(export.name.clone()));
        }
        if wanted.wanted.contains(&info::DESCRIPTION) && !export.description.is_empty() {
            infos.push(Info::Description(export.description.clone()));
        }
        // Also to those who have not asked: they may heed it.
        let (min, preferred, max) = (MIN_BLOCK_BYTES, PREFERRED_BYTES, MAX_PAYLOAD_BYTES);
        infos.push(Info::BlockSize(BlockSizes { min, preferred, max }));
        for info in infos {
            self.reply(option, reply::INFO, &info.encode())?;
        }
        if option == option::INFO {
            self.reply(option, reply::ACK, &[])?;
            return Ok(None);
        }
        // It may have been removed meanwhile.
        let Some(export) = (self.enter)(&export.name) else {
            self.unknown(option, &wanted.export)?;
            return Ok(None);
        };
        let chosen = self.chosen(export);
        // As for `EXPORT_NAME`.
        let _ = self.reply(option, reply::ACK, &[]);
        Ok(Some(chosen))
    }

    fn unknown(&self, option: u32, name: &str) -> io::Result<()> {
        self.refuse(option, reply::ERR_UNKNOWN, &format!("there is no export named {name:?}"))
    }

    fn meta_contexts(&mut self, option: u32, data: &[u8]) -> io::Result<()> {
        if !self.structured {
            let why = "metadata contexts need structured replies";
            return self.refuse(option, reply::ERR_INVALID, why);
        }
        let request = match MetaRequest::decode(data) {
            Ok(request) => request,
            Err(error) => return self.refuse(option, reply::ERR_INVALID, &error.to_string()),
        };
        let selects = option == option::SET_META_CONTEXT;
        if selects {
            self.contexts = (request.export.clone(), Vec::new());
        }
        let Some(export) = self.exports.find(&request.export) else {
            return self.unknown(option, &request.export);
        };
        let all = !selects && request.queries.is_empty();
        let is_wanted = |name: &str| {
            let names = |query: &String| {
                // When listing, a namespace or a kind of context names all of its own.
                query == name || !selects && query.ends_with(':') && name.starts_with(query)
            };
            all || request.queries.iter().any(names)
        };
        for (id, (context, name)) in (1..).zip(export.contexts) {
            if is_wanted(&name) {
                let told = if selects { id } else { 0 };
                self.reply(option, reply::META_CONTEXT, &MetaContext { id: told, name }.encode())?;
                if selects {
                    self.contexts.1.push((id, context));
                }
            }
        }
        self.reply(option, reply::ACK, &[])
    }
}
