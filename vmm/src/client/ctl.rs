//! `ferry ctl`: sends one command and prints its result, as JSON unless a person has asked in short words.

use super::request::Request;
use super::{ClientError, QmpClient, bitmap, job};
use crate::cli::CtlArgs;
use crate::error::chain;
use crate::exit_code;
use serde_json::{Value, json};

/// Words that are no command.
#[derive(Debug)]
enum Unclear {
    Problem(String),
    /// Also a wish for help.
    Words(clap::Error),
}

/// Sends the command; returns the exit code.
pub fn run(args: &CtlArgs) -> u8 {
    let Request { command, arguments, show, follow } = match translate(&args.command) {
        Ok(request) => request,
        Err(Unclear::Problem(problem)) => {
            eprintln!("ferry: {problem}");
            return exit_code::USAGE;
        }
        Err(Unclear::Words(error)) => {
            // Nobody may be listening.
            let _ = error.print();
            return if error.use_stderr() { exit_code::USAGE } else { exit_code::OK };
        }
    };
    let answer = QmpClient::connect(&args.socket)
        .and_then(|mut client| Ok((client.execute(&command, arguments)?, client)));
    match answer {
        Ok((_, mut client)) if let Some(follow) = follow => job::follow(&mut client, &follow),
        Ok((value, _)) => {
            println!("{}", show(&value));
            exit_code::OK
        }
        // A VMM that quits may be gone before its reply is read.
        Err(ClientError::Lost(_)) if command == "quit" => exit_code::OK,
        Err(error) => {
            eprintln!("ferry: {}", chain(&error));
            exit_code::COMMAND_FAILED
        }
    }
}

/// Expands shorthands; otherwise a QMP command and its arguments.
fn translate(words: &[String]) -> Result<Request, Unclear> {
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let request = |command: &str, arguments| Ok(Request::new(command, arguments));
    match words.as_slice() {
        ["status"] => request("query-status", json!({})),
        ["migration"] => request("query-migrate", json!({})),
        ["cancel"] => request("migrate_cancel", json!({})),
        ["give-up"] => request("x-migrate-give-up", json!({})),
        ["cont", "--force"] => request("cont", json!({"x-force": true})),
        ["mirror", ..] => job::mirror(&words).map_err(Unclear::Words),
        ["job", ..] => job::job(&words).map_err(Unclear::Words),
        ["bitmap", ..] => bitmap::request(&words).map_err(Unclear::Words),
        [command] => request(command, json!({})),
        [command, arguments] => match serde_json::from_str(arguments) {
            Ok(arguments @ Value::Object(_)) => request(command, arguments),
            _ => Err(Unclear::Problem(format!(
                "{arguments:?} is not a JSON object with the command's arguments"
            ))),
        },
        _ => Err(Unclear::Problem("expected a command and at most one JSON object".into())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn short_words_and_raw_commands_are_understood() {
        let of = |words: &[&str]| {
            translate(&words.iter().map(|word| (*word).to_owned()).collect::<Vec<_>>())
        };
        assert_eq!(of(&["status"]).unwrap().command, "query-status");
        assert_eq!(of(&["cont", "--force"]).unwrap().arguments, json!({"x-force": true}));
        assert_eq!(of(&["migrate", r#"{"uri":"tcp:h:1"}"#]).unwrap().arguments["uri"], "tcp:h:1");
        assert!(of(&["migrate", "tcp:h:1"]).is_err());
        let clear = of(&["bitmap", "clear", "root", "b0"]).unwrap();
        assert_eq!(clear.command, "block-dirty-bitmap-clear");
        assert!(matches!(of(&["bitmap", "clear"]), Err(Unclear::Words(_))));
    }
}
