//! One prompt in, the answer out as it comes: mlxd from Rust, with nothing but the standard library.
//!
//!     rustc -O process.rs && ./process "so um hello world"
//!
//! Speaks JSON lines: one JSON object a line, both ways. A program that does more takes serde_json or rmp-serde, and the
//! struct names and fields of docs/wire.md.

use std::env;
use std::io::{self, BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;

// quoted: ask
fn main() -> io::Result<()> {
    let prompt = env::args().skip(1).collect::<Vec<_>>().join(" ");
    let mut socket = UnixStream::connect(socket_path())?;
    let request = format!(
        r#"{{"jsonrpc":"2.0","id":1,"method":"process","params":{{"prompt":{},"stream":true}}}}"#,
        quoted(&prompt)
    );
    writeln!(socket, "{request}")?;
    for line in BufReader::new(socket).lines() {
        let line = line?;
        if line.contains(r#""method":"stream""#) {
            if let Some(text) = string_field(&line, "text") {
                print!("{text}");
                io::stdout().flush()?;
            }
        } else if line.contains(r#""error":"#) {
            let told = string_field(&line, "message").unwrap_or(line);
            return Err(io::Error::other(told));
        } else {
            println!();
            return Ok(());
        }
    }
    Err(io::Error::new(io::ErrorKind::UnexpectedEof, "mlxd closed the connection"))
}
// end quoted

/// MLXD_SOCKET, else mlxd.sock in MLXD_HOME or the platform's place.
fn socket_path() -> PathBuf {
    if let Some(path) = env::var_os("MLXD_SOCKET") {
        return path.into();
    }
    let home = env::var_os("MLXD_HOME").map(PathBuf::from).unwrap_or_else(|| {
        let user = PathBuf::from(env::var_os("HOME").expect("HOME is not set"));
        if cfg!(target_os = "macos") {
            user.join("Library/Application Support/mlxd")
        } else {
            env::var_os("XDG_DATA_HOME").map(PathBuf::from).unwrap_or(user.join(".local/share")).join("mlxd")
        }
    });
    home.join("mlxd.sock")
}

fn quoted(text: &str) -> String {
    let mut out = String::from('"');
    for letter in text.chars() {
        match letter {
            '"' | '\\' => out.extend(['\\', letter]),
            letter if (letter as u32) < 0x20 => out.push_str(&format!("\\u{:04x}", letter as u32)),
            letter => out.push(letter),
        }
    }
    out + "\""
}

/// The first string under `name`, unescaped.
fn string_field(json: &str, name: &str) -> Option<String> {
    let key = format!("\"{name}\":\"");
    let mut letters = json[json.find(&key)? + key.len()..].chars();
    let mut out = String::new();
    let mut half = None;
    loop {
        match letters.next()? {
            '"' => return Some(out),
            '\\' => match letters.next()? {
                'n' => out.push('\n'),
                't' => out.push('\t'),
                'r' => out.push('\r'),
                'b' => out.push('\u{8}'),
                'f' => out.push('\u{c}'),
                'u' => {
                    let code = u32::from_str_radix(&letters.by_ref().take(4).collect::<String>(), 16).ok()?;
                    match (half.take(), code) {
                        (None, 0xD800..=0xDBFF) => half = Some(code),
                        (Some(high), 0xDC00..=0xDFFF) => {
                            out.extend(char::from_u32(0x10000 + ((high - 0xD800) << 10) + (code - 0xDC00)))
                        }
                        (_, code) => out.extend(char::from_u32(code)),
                    }
                }
                letter => out.push(letter),
            },
            letter => out.push(letter),
        }
    }
}
