//! [`macro@needs`], which `ferry_tests` hands on: an attribute has to have a crate of its own.

use proc_macro::{Delimiter, Group, TokenStream, TokenTree};

/// What a test cannot do without, each a function of `ferry_tests::needs`. Where one of them is missing the
/// test says so and checks nothing, which is counted, and is a failure where it would hide something.
///
/// ```ignore
/// #[test]
/// #[needs(kvm, qemu_img)]
/// fn a_guest_boots_from_qcow2() {
/// ```
#[proc_macro_attribute]
pub fn needs(what: TokenStream, test: TokenStream) -> TokenStream {
    let mut tokens: Vec<TokenTree> = test.into_iter().collect();
    let Some(TokenTree::Group(body)) = tokens.pop() else {
        return r#"compile_error!("`needs` goes on a function");"#.parse().expect("it is Rust");
    };
    let paths = what.into_iter().map(|token| match token {
        TokenTree::Ident(need) => format!("::ferry_tests::needs::{need}"),
        other => other.to_string(),
    });
    let list: String = paths.collect();
    let check = format!("if !::ferry_tests::needs::are_met(&[{list}]) {{ return; }}");
    let mut inner: TokenStream = check.parse().expect("it is Rust");
    inner.extend(body.stream());
    let mut body_with_check = Group::new(Delimiter::Brace, inner);
    body_with_check.set_span(body.span());
    tokens.push(body_with_check.into());
    tokens.into_iter().collect()
}
