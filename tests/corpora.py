"""What the tests of the two corpora, the demo's and the résumés, ask of labelled rows."""

Row = dict[str, str | None]


def is_blank(text: str | None) -> bool:
    return text is None or not text.strip()


def labels_by_text(rows: list[Row]) -> dict[str, list[str | None]]:
    """The labels of each text that is not blank."""
    labels: dict[str, list[str | None]] = {}
    for row in rows:
        text = row["text"]
        if text is not None and not is_blank(text):
            labels.setdefault(text, []).append(row["label"])
    return labels
