//! What users write, and what is wrong with it.

use super::*;
use proptest::prelude::*;

fn unix(path: &str, export: &str) -> NbdAddress {
    NbdAddress::new(NbdServer::Unix(path.into()), export).unwrap()
}

fn tcp(host: &str, port: u16, export: &str) -> NbdAddress {
    NbdAddress::new(NbdServer::Tcp { host: host.into(), port }, export).unwrap()
}

#[test]
fn qemu_s_forms_and_uris_name_the_same_exports() {
    let cases = [
        ("nbd:unix:/run/x.sock", unix("/run/x.sock", ""), "nbd+unix://?socket=/run/x.sock"),
        ("nbd:unix:/a:exportname=d", unix("/a", "d"), "nbd+unix:///d?socket=/a"),
        ("nbd:unix:/a:exportname=", unix("/a", ""), "nbd+unix://?socket=/a"),
        ("nbd+unix:///d?socket=/a", unix("/a", "d"), "nbd+unix:///d?socket=/a"),
        ("nbd+unix://?socket=a%20b", unix("a b", ""), "nbd+unix://?socket=a%20b"),
        ("nbd:h:1:exportname=d", tcp("h", 1, "d"), "nbd://h:1/d"),
        ("nbd:localhost", tcp("localhost", 10809, ""), "nbd://localhost:10809"),
        ("nbd:[::1]:7", tcp("::1", 7, ""), "nbd://[::1]:7"),
        ("nbd:h:1:exportname=100%", tcp("h", 1, "100%"), "nbd://h:1/100%25"),
        ("nbd://10.0.0.1/", tcp("10.0.0.1", 10809, ""), "nbd://10.0.0.1:10809"),
        ("nbd+tcp://h:/d", tcp("h", 10809, "d"), "nbd://h:10809/d"),
        ("nbd://h//d", tcp("h", 10809, "/d"), "nbd://h:10809//d"),
        ("nbd://h/hello%20world", tcp("h", 10809, "hello world"), "nbd://h:10809/hello%20world"),
        ("nbd://[fe80::1%25eth0]:9/x", tcp("fe80::1%eth0", 9, "x"), "nbd://[fe80::1%25eth0]:9/x"),
        ("nbd://[::1]", tcp("::1", 10809, ""), "nbd://[::1]:10809"),
    ];
    for (text, address, shown) in cases {
        assert_eq!(text.parse::<NbdAddress>(), Ok(address.clone()), "{text}");
        assert_eq!(address.to_string(), shown);
        assert_eq!(shown.parse(), Ok(address));
    }
}

#[test]
fn an_error_names_what_is_wrong() {
    let long = format!("nbd:unix:/a:exportname={}", "x".repeat(4097));
    let deep = format!("nbd:unix:/{}", "x".repeat(107));
    let cases = [
        ("disk.img", "nbd:unix:PATH"),
        ("http://h/x", "nbd:unix:PATH"),
        ("nbds://h/x", "TLS"),
        ("nbds+unix:///x?socket=/a", "nbd+unix://"),
        ("nbd:", "no host"),
        ("nbd:///x", "no host"),
        ("nbd::10809", "no host"),
        ("nbd:::1:10809", "brackets"),
        ("nbd:[::1", "brackets"),
        ("nbd://[h]/x", "brackets"),
        ("nbd://[::1]x/", "brackets"),
        ("nbd://[1::2::3]/", "brackets"),
        ("nbd://a b/", "host \"a b\""),
        ("nbd:h:0", "port \"0\""),
        ("nbd:h:65536", "port \"65536\""),
        ("nbd:h:+1", "port \"+1\""),
        ("nbd:h:1,ipv4=on", "port \"1,ipv4=on\""),
        ("nbd:unix:", "1 to 107"),
        (&deep, "108 bytes"),
        (&long, "4097 bytes"),
        ("nbd+unix:///x", "no socket"),
        ("nbd+unix://h/x?socket=/a", "third slash"),
        ("nbd+unix:///x?socket=/a&socket=/b", "\"socket\""),
        ("nbd+unix:///x?socket=/a&tls-type=anon", "\"tls-type\""),
        ("nbd://h/x?socket=/a", "\"socket\""),
        ("nbd+unix:///x?socket=%00a", "NUL"),
        ("nbd://h/%00", "NUL"),
        ("nbd://h/%2", "%2"),
        ("nbd://h/%zz", "%zz"),
        ("nbd://h/%ff", "UTF-8"),
        ("nbd://u@h/", "a user"),
        ("nbd://h/a#b", "%23"),
    ];
    for (text, part) in cases {
        let error = text.parse::<NbdAddress>().unwrap_err().to_string();
        assert!(error.contains(part), "{text}: {error}");
        assert!(error.len() < 600, "{text}: {} bytes", error.len());
    }
    assert!(NbdAddress::is_meant_by("nbd:x") && NbdAddress::is_meant_by("nbds://h"));
    assert!(!NbdAddress::is_meant_by("nbdisk.img") && !NbdAddress::is_meant_by("/nbd:x"));
}

proptest! {
    #[test]
    fn whatever_an_address_is_it_parses_as_what_it_displays_as(
        path in "[ -~ä€]{1,30}", export in "[ -~ä€\n]{0,60}", host in "[a-z0-9.-]{1,20}", port in 1u16..,
    ) {
        for address in [unix(&path, &export), tcp(&host, port, &export), tcp("1::2", port, &export)] {
            prop_assert_eq!(address.to_string().parse(), Ok(address));
        }
    }

    #[test]
    fn arbitrary_text_never_panics(text in "(nbd(s|[+]unix|[+]tcp)?:(//|unix:)?)?[ -~ä\\[\\]%:/?#=]{0,80}") {
        let _ = text.parse::<NbdAddress>();
    }
}
