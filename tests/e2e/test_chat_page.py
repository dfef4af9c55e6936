"""The chat page in a real browser: Chromium, driven by Playwright.

Nothing but loopback may be asked for: every other request is noted, and none must have been tried.
The models are small and random; the engine is made to say what each test wants.
"""

import json
import re
import shutil
import signal
import threading
import wave
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import httpx2
import numpy as np
import pytest
from PIL import Image
from tests.scripted import scripted, shelf_of, sizes

from phikit.base.servers import running
from phikit.chat.history import History
from phikit.chat.message import Message
from phikit.models.dense import DenseModel
from phikit.models.multimodal import MultimodalModel
from phikit.serve.page_reply import Settings
from phikit.serve.page_talks import Choice, Talks

pytest.importorskip("gradio", reason="needs the extra ui")
pytest.importorskip("playwright", reason="needs a browser driver: pip install playwright")
BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine"),
]

ATTACK = """Look:
<script>window.hacked = 1</script>
<img src=x onerror="window.hacked = 2">
<img src="https://evil.example/pixel.png">
![pixel](https://evil.example/markdown.png)
<svg onload="window.hacked = 3"></svg>
<iframe srcdoc="<script>parent.hacked = 4</script>"></iframe>
<a href="javascript:window.hacked = 5">click me</a>
[click me](javascript:window.hacked=6)
<form action="https://evil.example"><button>send</button></form>
<style>@import url(https://evil.example/style.css); body { background: red }</style>
$$\\href{javascript:window.hacked=8}{x}$$
That was nearly all.
<math><mtext><table><mglyph><style><img src=x onerror="window.hacked = 7">"""
STORED = "phikit-settings"
REPLIES = {
    "add": Message(
        "assistant",
        "It is **19**, as $$x = 12 + 7$$ and \\(x^2 = 361\\) and \\[y = 1\\] show.",
        "12 + 7 = 19, so I say 19. " * 6,
    ),
    "long": Message("assistant", "on and on " * 40),
    "attack": Message("assistant", ATTACK, ATTACK),
    "see": Message("assistant", "I see noise and hear a tone."),
    "code": Message("assistant", "```python\nprint('<b>')\n```\n\n- one\n- two"),
}


class Served(NamedTuple):
    url: str
    talks: Talks


@pytest.fixture(scope="module")
def served(tiny_model, tiny_multimodal, tmp_path_factory) -> Iterator[Served]:
    """The page, served by a thread of this process on a free port."""
    import uvicorn

    from phikit.serve.page import page_app

    folder = tmp_path_factory.mktemp("page")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_TEMP_DIR", str(folder / "uploads"))
        text = scripted(tiny_model(**sizes(DenseModel)), REPLIES, pause_s=0.01)
        senses = scripted(tiny_multimodal(**sizes(MultimodalModel)), REPLIES)
        shelf = shelf_of(text=text, senses=senses)
        choices = [Choice("text"), Choice("senses", True, True, ("vision", "speech"))]
        history = History(folder / "history.sqlite3")
        talks = Talks(shelf, choices, history=history, media=folder / "media")
        app = page_app(talks, model="text", settings=Settings(max_new_tokens=1500))
        server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning"))
        thread = threading.Thread(target=server.run, daemon=True)
        thread.start()
        while not server.started:
            assert thread.is_alive()
            thread.join(0.05)
        port = server.servers[0].sockets[0].getsockname()[1]
        yield Served(f"http://127.0.0.1:{port}/", talks)
        server.should_exit = True
        thread.join(10)
        shelf.close()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright  # pyright: ignore[reportMissingImports]

    with sync_playwright() as playwright:
        # Chromium asks its maker's servers for this and that; all of it is off.
        quiet = ["--no-sandbox", "--disable-background-networking", "--disable-component-update"]
        browser = playwright.chromium.launch(executable_path=BROWSER, args=quiet)
        yield browser
        browser.close()


@pytest.fixture
def tab(browser, served) -> Iterator[Any]:
    """A tab that shows the page; notes what goes wrong in it and fails on it at the end."""
    context = browser.new_context(viewport={"width": 1280, "height": 800}, accept_downloads=True)
    abroad, faults = [], []

    def refuse(route: Any) -> None:
        abroad.append(route.request.url)
        route.abort()

    context.route(re.compile(f"^(?!data:|blob:|{re.escape(served.url)})"), refuse)
    context.set_default_timeout(180_000)  # a busy machine is no fault of the page
    page = context.new_page()
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on("console", lambda m: faults.append(m.text) if m.type == "error" else None)
    page.goto(served.url)
    page.wait_for_selector("#box textarea")
    # What Gradio notes when a tab is left in mid-reply.
    page.expected_faults = ("AbortError", "Connection errored out")
    yield page
    left = [fault for fault in faults if not any(word in fault for word in page.expected_faults)]
    context.close()
    assert abroad == []
    assert left == []


def ask(tab: Any, text: str, *, wait: bool = True) -> None:
    before = tab.locator(".user-row").count()
    tab.fill("#box textarea", text)
    tab.keyboard.press("Enter")
    tab.locator(".user-row").nth(before).wait_for()
    if wait:
        done(tab)


def done(tab: Any) -> None:
    """Wait for the end of a reply: its figures are there and the send button is back."""
    tab.wait_for_selector("#box [data-testid=submit-button]")
    tab.locator(".bot-row").last.locator(".figures").wait_for()


def bot(tab: Any) -> Any:
    return tab.locator(".bot-row").last


def test_a_reply_streams_with_folded_thinking_and_mathematics(tab):
    assert tab.locator(".example").count() == 4
    ask(tab, "add 12 and 7", wait=False)
    title = bot(tab).locator(".thought-group .title")
    title.get_by_text(re.compile(r"Thinking … \d+ s")).wait_for()
    assert not bot(tab).get_by_text("so I say 19").is_visible()
    title.click()  # whoever wants to reads along
    bot(tab).get_by_text("so I say 19").first.wait_for()
    done(tab)
    assert re.search(r"Thought for \d+ s", title.inner_text())
    title.click()
    bot(tab).get_by_text("so I say 19").first.wait_for(state="hidden")
    assert bot(tab).locator("strong").inner_text() == "19"
    assert bot(tab).locator(".katex").count() == 3
    assert bot(tab).locator(".katex-display").count() == 2
    figures = bot(tab).locator(".figures").inner_text()
    assert re.fullmatch(r"[\d,]+ tokens · [\d.]+ tokens/s · prompt of \d+ tokens · text", figures)


def test_stop_keeps_what_was_said(tab, served):
    ask(tab, "long story", wait=False)
    bot(tab).get_by_text("on and on on").wait_for()
    tab.click("#box [data-testid=stop-button], #box .stop-button")
    done(tab)
    assert "stopped" in bot(tab).locator(".figures").inner_text()
    assert bot(tab).inner_text().count("on and on") < 38
    [served_model] = [m for m in served.talks.shelf.loaded if m.name == "text"]
    assert served_model.worker.stats().running == 0


def test_regenerate_and_edit(tab):
    ask(tab, "add 12 and 7")
    ask(tab, "code please")
    assert bot(tab).locator("li").count() == 2
    assert "print('<b>')" in bot(tab).locator("code").first.inner_text()
    bot(tab).locator("xpath=following::button[@aria-label='Retry'][1]").click()
    tab.wait_for_timeout(300)
    done(tab)
    assert tab.locator(".user-row").count() == tab.locator(".bot-row").count() == 2
    tab.locator("button[aria-label=Edit]").first.click()
    tab.locator(".edit-textarea").fill("long story")
    tab.locator("button[aria-label=Submit]").first.click()
    bot(tab).get_by_text("on and on").wait_for()
    done(tab)
    assert tab.locator(".user-row").count() == 1
    assert "long story" in tab.locator(".user-row").inner_text()


def test_a_reload_finds_the_conversation_even_in_mid_reply(tab, served):
    ask(tab, "long reload", wait=False)
    bot(tab).get_by_text("on and on").wait_for()
    tab.wait_for_url(re.compile(r"\?c=\w+"))
    tab.reload()
    bot(tab).get_by_text("on and on").wait_for()
    done(tab)
    assert bot(tab).inner_text().count("on and on") == 40
    tab.click("#new")
    tab.wait_for_selector(".example")
    assert "?c=" not in tab.url
    tab.locator("#talks label", has_text="long reload").click()
    bot(tab).get_by_text("on and on").wait_for()
    tab.wait_for_url(re.compile(r"\?c=\w+"))


def test_a_reload_finds_the_settings(tab):
    from playwright.sync_api import expect  # pyright: ignore[reportMissingImports]

    choose(tab, "senses")
    choose(tab, "vision", "#adapter")
    tab.locator("#controls .toggle-button").click()
    tab.get_by_label("Seed").fill("17")
    tab.get_by_label("Send earlier turns").uncheck()
    tab.get_by_label("System prompt").fill("Be brief.")
    tab.keyboard.press("Tab")
    kept_when_quiet(tab)
    tab.reload()
    expect(tab.locator("#model input")).to_have_value("senses", timeout=60_000)
    assert tab.locator("#adapter input").input_value() == "Adapter: vision"
    tab.locator("#controls .toggle-button").click()
    assert tab.get_by_label("Seed").input_value() == "17"
    assert not tab.get_by_label("Send earlier turns").is_checked()
    assert tab.get_by_label("System prompt").input_value() == "Be brief."
    ask(tab, "see this")
    assert "I see noise" in bot(tab).inner_text()


def test_the_command_tells_ps_of_itself(start, random_model):
    process = start("chat", random_model(160), "--web", "--port", 0, "--no-history")
    found = (re.search(r"open (\S+)/ in a browser", line) for line in process.stdout)
    url = next(match[1] for match in found if match)
    [server] = [server for server in running() if server.pid == process.pid]
    assert server.url == url and server.models
    assert httpx2.get(f"{url}/api/ps", timeout=60).json()["models"] is not None
    assert httpx2.get(f"{url}/health", timeout=60).json() == {"status": "ok"}
    process.send_signal(signal.SIGINT)
    process.wait(60)
    assert process.pid not in [server.pid for server in running()]


def test_two_tabs_share_one_engine_and_the_conversations(tab, served):
    other = tab.context.new_page()
    other.goto(served.url)
    other.wait_for_selector("#box textarea")
    ask(tab, "long first", wait=False)
    ask(other, "add second", wait=False)
    done(other)
    done(tab)
    assert bot(tab).inner_text().count("on and on") == 40
    assert len([m for m in served.talks.shelf.loaded if m.name == "text"]) == 1
    other.reload()
    other.locator("#talks label", has_text="long first").wait_for()


def test_export_and_delete(tab, served):
    ask(tab, "add for export")
    tab.wait_for_url(re.compile(r"\?c=\w+"))
    id_ = tab.url.partition("?c=")[2]
    for name, suffix in (("Markdown", "md"), ("JSON", "json")):
        with tab.expect_download() as download:
            tab.locator("#links a", has_text=name).click()
        text = Path(download.value.path()).read_text()
        assert download.value.suggested_filename == f"{id_}.{suffix}"
        assert "It is **19**" in text and "so I say 19" in text
        if suffix == "json":
            assert json.loads(text)["turns"][0]["content"] == "add for export"
    tab.click("#delete")
    tab.locator("#confirm button", has_text="Keep").click()
    tab.click("#delete")
    tab.locator("#confirm button", has_text="Delete for good").click()
    tab.wait_for_selector(".example")
    assert id_ not in [talk.id for talk in served.talks.listed()]
    assert tab.locator("#talks label", has_text="add for export").count() == 0


def test_an_image_and_a_sound(tab, served, tmp_path):
    """Attaching is offered only where the model can take it."""
    upload = "#box button[aria-label='Upload a file'], #box [data-testid=upload-button]"
    assert tab.locator(upload).count() == 0
    choose(tab, "senses")
    tab.wait_for_selector(upload)
    noise = np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "noise.png")
    with wave.open(str(tmp_path / "tone.wav"), "wb") as file:
        file.setparams((1, 2, 16000, 0, "NONE", ""))
        file.writeframes((8000 * np.sin(np.arange(8000) / 8)).astype("<i2").tobytes())
    for name in ("noise.png", "tone.wav"):
        with tab.expect_file_chooser() as chooser:
            tab.locator(upload).click()
        chooser.value.set_files(tmp_path / name)
        tab.wait_for_timeout(500)
    ask(tab, "see this")
    assert "I see noise" in bot(tab).inner_text()
    assert tab.locator(".user-row img").count() == 1
    assert tab.locator("#adapter").is_visible()
    tab.wait_for_url(re.compile(r"\?c=\w+"))
    question, reply = served.talks.turns(tab.url.partition("?c=")[2])
    assert [medium.kind for medium in question.media] == ["image", "audio"]
    assert reply.model == "senses" and reply.prompt_tokens and reply.prompt_tokens > 20
    tab.reload()
    tab.locator(".user-row img").wait_for()


def test_a_question_too_long_is_refused_with_both_numbers(tab):
    ask(tab, "word " * 2500, wait=False)
    failure = tab.locator(".failure")
    failure.wait_for()
    assert re.search(r"\d+ new tokens = \d+, and the model's context is 2048", failure.inner_text())
    assert "Next: start a new chat" in failure.inner_text()


def test_what_a_model_writes_runs_no_script_and_asks_nobody(tab, served):
    tab.expected_faults += ("404", "Content Security Policy")  # <img src=x>, and what is not ours
    choose(tab, "senses")
    ask(tab, "attack")
    bot(tab).locator(".thought-group .title").click()
    tab.wait_for_timeout(500)
    for link in bot(tab).locator("a").all():
        assert "javascript:" not in (link.get_attribute("href") or "")
    assert bot(tab).locator("script, iframe, style, [onerror], [onload]").count() == 0
    assert tab.evaluate("window.hacked") is None
    assert "That was nearly all." in bot(tab).inner_text()
    # Were the cleaning to fail, the policy of the page would still hold.
    tab.evaluate(
        """() => {
            const box = document.createElement("div");
            box.innerHTML = '<img src=x onerror="window.hacked = 9">';
            document.body.append(box);
            const script = document.createElement("script");
            script.textContent = "window.hacked = 10";
            document.body.append(script);
        }"""
    )
    tab.wait_for_timeout(500)
    assert tab.evaluate("window.hacked") is None
    # A form may stand there, and can be sent nowhere. Last, since Playwright waits for its page.
    tab.evaluate("document.querySelectorAll('.bot-row form').forEach(form => form.requestSubmit())")
    assert tab.url.startswith(served.url)


def test_light_dark_and_phone(tab, served):
    is_dark = "document.body.classList.contains('dark')"
    assert not tab.evaluate(is_dark)
    tab.click("#theme")
    assert tab.evaluate(is_dark)
    tab.set_viewport_size({"width": 390, "height": 780})
    tab.reload()
    tab.wait_for_selector("#box textarea")
    tab.wait_for_function(is_dark)
    tab.wait_for_selector("#talks-panel:not(.open)", state="attached")
    assert tab.evaluate("document.documentElement.scrollWidth") <= 390
    box = tab.locator("#box").bounding_box()
    assert box["y"] + box["height"] <= 780


def kept_when_quiet(tab: Any) -> str:
    """What the browser keeps of the settings, once it has been the same for two seconds."""
    kept, now = None, ""
    while kept is None or kept != now:
        kept = now
        tab.wait_for_timeout(2000)
        now = tab.evaluate("key => localStorage.getItem(key)", STORED)
    return now


def choose(tab: Any, name: str, dropdown: str = "#model") -> None:
    tab.click(f"{dropdown} input")
    tab.locator("[role=option]", has_text=name).click()
