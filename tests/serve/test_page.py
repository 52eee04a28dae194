"""The chat page in a real browser: type, stream, stop, reload, keyboard, both widths and schemes."""

import pytest

pytest.importorskip("fcntl")  # Windows has none

from browser import CHROMIUM, Browser

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
WIDE, NARROW = {"width": 1280, "height": 860}, {"width": 390, "height": 844}
TEXT = "document.querySelector('#messages .assistant:last-child .text').textContent"
FACTS = "document.querySelector('#messages .assistant:last-child .facts').textContent"
IDLE = "running === null"


@pytest.fixture(scope="module")
def one_browser(tmp_path_factory):
    one = Browser(tmp_path_factory.mktemp("profile"))
    yield one
    one.close()


@pytest.fixture
def browser(one_browser, server):
    """The page, connected and without a conversation."""
    one_browser.open(server.url, **WIDE)
    one_browser.ask("sessionStorage.clear()")
    one_browser.open(server.url, **WIDE)
    one_browser.wait_for("document.getElementById('model').textContent.startsWith('tiny')")
    yield one_browser
    assert not one_browser.happened("Runtime.exceptionThrown")


def set_field(browser, name, value):
    browser.ask(f"document.getElementById('{name}').value = '{value}'")


def expected(server, question, n, **options):
    messages = [{"role": "user", "content": question}]
    return server.model.generate(messages, max_new_tokens=n, **options).text


def ask(browser, question):
    """Type a question and send it, with the keyboard alone."""
    browser.type(question)
    browser.press("Enter")
    browser.wait_for("document.querySelector('#messages .assistant') !== null")


def test_question_is_answered_and_the_conversation_goes_on(browser, server):
    set_field(browser, "max_tokens", 12)
    ask(browser, "Hello")
    browser.wait_for(IDLE)
    assert browser.ask(TEXT) == expected(server, "Hello", 12)
    assert "tokens/s" in browser.ask(FACTS)
    assert browser.ask("document.querySelector('#plain b').textContent") != "\N{EN DASH}"
    assert browser.ask("document.querySelector('#live b').textContent") != "\N{EN DASH}"
    ask(browser, "And then?")
    browser.wait_for(IDLE)
    assert browser.ask("document.querySelectorAll('#messages li').length") == 4
    assert browser.ask("messages.map((one) => one.role).join()") == "user,assistant,user,assistant"


def test_tokens_are_coloured_by_their_origin(browser, server):
    set_field(browser, "max_tokens", 60)
    ask(browser, "abcabcabc" * 6)
    browser.wait_for(IDLE)
    classes = set(
        browser.ask(
            "[...document.querySelectorAll('.assistant .text span')].map((s) => s.className)"
        )
    )
    assert "source-model" in classes
    assert classes <= {"source-model", "source-n-gram", "source-early-exit"}


def test_escape_and_the_button_stop_an_answer(browser, server):
    server.engine.resumed.clear()
    try:
        for stop in ("Escape", "button"):
            ask(browser, "Hello")
            browser.wait_for("running !== null && !document.getElementById('stop').hidden")
            if stop == "Escape":
                browser.press("Escape")
            else:
                browser.ask("document.getElementById('stop').click()")
            browser.wait_for(IDLE)
            assert browser.ask(FACTS) == "stopped"
    finally:
        server.engine.resumed.set()
    assert browser.ask("document.activeElement.id") == "question"


def test_reload_keeps_the_conversation_and_settings(browser, server):
    set_field(browser, "max_tokens", 8)
    set_field(browser, "system", "Be brief.")
    browser.ask("document.querySelector('input[value=plain]').click()")
    ask(browser, "Hello")
    browser.wait_for(IDLE)
    text = browser.ask(TEXT)
    browser.open(server.url, **WIDE)
    assert browser.ask(TEXT) == text
    assert browser.ask("document.getElementById('system').value") == "Be brief."
    assert browser.ask("mode()") == "plain"
    browser.ask("document.getElementById('new').click()")
    browser.open(server.url, **WIDE)
    assert browser.ask("document.querySelectorAll('#messages li').length") == 0
    assert not browser.ask("document.getElementById('welcome').hidden")


def test_keys_reach_every_control(browser):
    reached = []
    for _ in range(20):
        browser.press("Tab")
        name = "(document.activeElement.id || document.activeElement.textContent.trim())"
        reached.append(browser.ask(name))
    for control in (
        "new",
        "system",
        "temperature",
        "top_p",
        "max_tokens",
        "seed",
        "key",
        "Settings",
    ):
        assert control in reached
    assert browser.ask("getComputedStyle(document.activeElement).outlineStyle") != "none"


def test_content_is_shown_as_text(browser, server):
    set_field(browser, "max_tokens", 4)
    ask(browser, "<img src=x onerror='document.hacked = 1'><b>bold</b>")
    browser.wait_for(IDLE)
    assert "<b>bold</b>" in browser.ask("document.querySelector('.user .text').textContent")
    assert browser.ask("document.querySelectorAll('#messages img, #messages b').length") == 0
    assert browser.ask("document.hacked") is None


def test_error_is_shown_where_the_answer_would_be(browser, server):
    ask(browser, "x" * 600)
    browser.wait_for(IDLE)
    assert "maximum context length" in browser.ask(FACTS)
    assert browser.ask("messages.length") == 0


def test_key_is_asked_for(one_browser, start):
    server = start(api_key="secret")
    one_browser.open(server.url, **WIDE)
    one_browser.wait_for("document.activeElement.id === 'key'")
    one_browser.type("secret")
    one_browser.press("Tab")
    one_browser.wait_for("document.getElementById('model').textContent.startsWith('tiny')")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [WIDE, NARROW], ids=["wide", "narrow"])
def test_page_fits_its_window_in_both_schemes(browser, server, size, scheme):
    browser.open(server.url, **size, scheme=scheme)
    browser.wait_for("document.getElementById('model').textContent.startsWith('tiny')")
    assert browser.ask("document.documentElement.scrollWidth") <= size["width"]
    assert browser.ask("document.documentElement.scrollHeight") <= size["height"]
    box = "document.getElementById('send').getBoundingClientRect()"
    assert browser.ask(f"{box}.bottom") <= size["height"]
    background = browser.ask("getComputedStyle(document.body).backgroundColor")
    shades = [int(part) for part in background[4:-1].split(",")]
    assert (max(shades) < 60) if scheme == "dark" else (min(shades) > 200)
    urls = {one["request"]["url"] for one in browser.happened("Network.requestWillBeSent")}
    assert all(url.startswith((server.url, "data:")) for url in urls)
    assert not browser.happened("Log.entryAdded")
