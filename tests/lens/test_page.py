"""The page: its structure, and that tokens stay text whatever they hold."""

import base64
import hashlib
import json
import re
from html.parser import HTMLParser

import pytest
from reports import NASTY, hand_made_lens, nasty_report, scripted_report

from layerskip.lens import Agreement, visible
from layerskip.lens.page import agreement_page, report_page


class Reader(HTMLParser):
    """Tags with their attributes, and the text inside each kind of tag."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.texts, self._open = [], {}, []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self._open.append(tag)

    def handle_endtag(self, tag):
        while self._open and self._open.pop() != tag:
            pass

    def handle_data(self, data):
        if self._open:
            self.texts.setdefault(self._open[-1], []).append(data)

    def all(self, tag, **attributes):
        return [a for t, a in self.tags if t == tag and attributes.items() <= a.items()]


@pytest.fixture(scope="module")
def page():
    return report_page(nasty_report())


@pytest.fixture(scope="module")
def reader(page):
    return Reader(page)


def test_tokens_are_text_and_never_markup(reader):
    assert not reader.all("img")
    assert len(reader.all("script")) == 2
    for token in NASTY.values():
        assert visible(token) in reader.texts["bdi"]
    data = json.loads(reader.texts["script"][0])
    assert {visible(token) for token in NASTY.values()} <= set(data["symbols"])


def test_the_browser_may_run_this_script_alone_and_fetch_nothing(page, reader):
    policy = reader.all("meta", **{"http-equiv": "Content-Security-Policy"})[0]["content"]
    digest = base64.b64encode(hashlib.sha256(reader.texts["script"][1].encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in policy
    assert policy.startswith("default-src 'none'")
    assert not [a for _, a in reader.tags if {"src", "href", "onclick"} & set(a)]
    assert not re.search(r"https?:|@import|url\(", page)


def test_table_can_be_read_without_eyes(reader):
    report = nasty_report()
    columns, layers = len(report.lens.positions), len(report.lens.exits)
    assert len(reader.all("table")) == 2
    assert len(reader.all("th", scope="row")) == layers + 1 + len(report.rounds)
    assert len(reader.all("td", tabindex="0")) == 1
    assert len(reader.all("td", tabindex="-1")) == columns * layers - 1
    assert reader.all("div", role="tooltip")


def test_cells_hold_what_the_layers_say():
    """The third of eight answer tokens is missed below the last layer; no cell of its column agrees."""
    reader = Reader(report_page(scripted_report(range(10, 18), misses={2})))
    cells = reader.all("td")[: 9 * 4]
    classes = [cell["class"].split() for cell in cells]
    columns = [[classes[row * 9 + column] for row in range(4)] for column in range(9)]
    for column in columns[1:3] + columns[4:]:  # position 1 belongs to the prompt
        assert ["agrees" in c for c in column] == [True] * 4
        assert ["saturates" in c for c in column] == [False, False, False, True]
    assert ["agrees" in c for c in columns[3]] == [True, False, False, False]
    assert ["saturates" in c for c in columns[3]] == [True, False, False, False]
    assert ["edge" in c for c in columns[3]] == [False, True, True, True]
    data = json.loads(reader.texts["script"][0])
    below = data["cells"][1][3]
    assert data["symbols"][below["top"][0][0]] == "#13"
    assert below["answer"] < 0.01 < below["top"][0][1]


class Twins:
    """Stands in for a tokenizer whose tokens all look alike, as halves of characters do."""

    eos_token_id = None

    def decode(self, ids, **_):
        return "\N{REPLACEMENT CHARACTER}" * len(ids)


def test_tokens_that_look_alike_are_not_taken_for_one_another():
    report = scripted_report(range(10, 18), misses={2}, tokenizer=Twins())
    data = json.loads(Reader(report_page(report)).texts["script"][0])
    answer, below = (data["cells"][row][3]["top"][0][0] for row in (0, 1))
    assert answer != below
    assert data["symbols"][answer] == data["symbols"][below]


def test_rounds_are_told(page):
    """Three drafted and two right, then two drafted and both right, in two rounds of three tokens."""
    text = " ".join(re.sub(r"<[^>]+>", "", page).split())
    assert "Of 5 drafted tokens 4 were accepted (80%): 3.00 tokens a round." in text
    assert text.count("accepted: ") == 4
    assert text.count("rejected: ") == 1
    assert text.count("dropped with it: ") == 0
    assert text.count("corrected to: ") == 1
    assert text.count("added: ") == 1


@pytest.mark.parametrize(
    ("positions", "answer"),
    [(range(1, 2), ""), (range(1, 4), "#10#11…"), (range(3, 9), "#11#12#13#14#15#16")],
)
def test_the_answer_as_far_as_it_was_asked_for(positions, answer):
    report = scripted_report(range(10, 17), prompt=(1, 2)).part(positions)
    found = re.search(r'<p class="ribbon">(.*?)</p>', report_page(report), re.DOTALL)
    assert re.sub(r"<[^>]+>", "", found[1] if found else "") == answer


def test_page_of_agreement():
    agreement = Agreement.of(hand_made_lens([[7, 7, 7, 7], [1, 7, 7, 7], [7, 1, 7, 7]]))
    reader = Reader(agreement_page(agreement, "<b>model</b>"))
    assert not reader.all("b")
    assert [a["style"] for a in reader.all("td")][-2:] == ["--p:66.7", "--p:33.3"]
