import base64
from html.parser import HTMLParser

from PIL import Image

from coss_hf.reporting import html_page as html


class Reader(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.text, self.sources = [], [], [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.sources += [value for key, value in attributes if key in ("src", "href")]
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def test_page_is_complete_and_loads_nothing_from_elsewhere(tmp_path):
    path = tmp_path / "a.png"
    Image.new("RGB", (2, 3)).save(path)
    parts = [
        html.heading("A & B"),
        html.paragraph("<b>not bold</b>", "lead"),
        html.code("a <b>"),
        html.paragraph("!", "alarm"),
    ]
    parts += [html.html_table([["", "x"], ["row <1>", "2"]]), html.image(path, 'a "caption"')]
    text = html.page("Title <i>", parts)
    assert "<p class=lead>" in text and "<p class=alarm>!</p>" in text and "p.alarm {" in text
    reader = Reader(text)
    assert {"b", "i", "script", "link"}.isdisjoint(reader.tags)
    assert all(word in reader.text for word in ("Title <i>", "A & B", "<b>not bold</b>", "row <1>", "a <b>"))
    (source,) = reader.sources
    assert source.startswith("data:image/png;base64,")
    assert base64.b64decode(source.split(",")[1]) == path.read_bytes()


def test_page_suits_phones_and_dark_mode():
    text = html.page("title", [])
    assert 'name="viewport" content="width=device-width, initial-scale=1"' in text
    assert "@media (max-width: 40rem)" in text and text.count("prefers-color-scheme: dark") == 2
