//! Prints the figures: for a terminal, or as Markdown that can be pasted into a README.

/// Host, versions and date.
pub struct Head {
    pub host: String,
    /// `None` if there is none.
    pub qemu: Option<String>,
    /// The same.
    pub newer: Option<String>,
    pub ferry: String,
    /// In words.
    pub runs: String,
}

/// Title, unit, three programs, ratio, target, verdict.
pub type Line = [String; 8];

impl Head {
    /// One line.
    pub fn text(&self) -> String {
        let Self { host, qemu, newer, ferry, runs } = self;
        let or_absent = |version: &Option<String>| version.clone().unwrap_or("absent".into());
        let (qemu, newer) = (or_absent(qemu), or_absent(newer));
        format!("{host}; {runs}. Ferry: {ferry}; QEMU: {qemu}; newer QEMU: {newer}")
    }
}

/// The table as Markdown: what it was measured on, then the figures, then `remark`.
pub fn markdown(head: &Head, table: &[Line], remark: Option<&str>) -> String {
    let names = ["", "unit", "QEMU", "newer QEMU", "Ferry", "ratio", "target", "verdict"];
    let row = |cells: &[String]| {
        let cells: Vec<_> = cells.iter().map(|cell| escaped(cell)).collect();
        format!("| {} |\n", cells.join(" | "))
    };
    let mut text = format!("{}.\n\n", escaped(&head.text()));
    text += &row(&names.map(str::to_owned));
    text += "|---|---|--:|--:|--:|--:|---|---|\n";
    table.iter().for_each(|line| text += &row(line));
    if let Some(remark) = remark {
        text += &format!("\n{}\n", escaped(remark));
    }
    text
}

/// What ends a cell, begins a tag or a quote.
fn escaped(text: &str) -> String {
    text.replace('|', "\\|").replace('<', "&lt;").replace('>', "&gt;")
}

/// The table for a terminal; the head is there already.
pub fn plain(table: &[Line], remark: Option<&str>) -> String {
    let names = ["", "", "QEMU", "newer QEMU", "Ferry", "ratio", "target", ""].map(str::to_owned);
    let line = |[title, unit, qemu, newer, ferry, ratio, target, met]: &Line| {
        let columns = format!("{qemu:>20} {newer:>20} {ferry:>20} {ratio:>7}");
        format!("{title:46} {unit:>5} {columns}  {target:13} {met}\n")
    };
    let mut text: String = std::iter::once(&names).chain(table).map(line).collect();
    if let Some(remark) = remark {
        text += &format!("\n{remark}\n");
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn markdown_is_whole_and_every_row_has_the_same_cells() {
        let head = Head {
            host: "2026-01-02, 4 x Some <CPU>, Linux 6.1".into(),
            qemu: Some("7.2.0".into()),
            newer: None,
            ferry: "0.1.0".into(),
            runs: "medians of 5".into(),
        };
        let cells = ["a | b", "s", "> 60", "-", "1.00 (0.90-1.10)", "< 0.02", "≤ 20", "met"];
        let text = markdown(&head, &[cells.map(str::to_owned)], Some("Said in the end."));
        let expected = "\
2026-01-02, 4 x Some &lt;CPU&gt;, Linux 6.1; medians of 5. Ferry: 0.1.0; QEMU: 7.2.0; newer QEMU: absent.

|  | unit | QEMU | newer QEMU | Ferry | ratio | target | verdict |
|---|---|--:|--:|--:|--:|---|---|
| a \\| b | s | &gt; 60 | - | 1.00 (0.90-1.10) | &lt; 0.02 | ≤ 20 | met |

Said in the end.
";
        assert_eq!(text, expected);
    }
}
