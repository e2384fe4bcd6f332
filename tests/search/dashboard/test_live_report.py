"""The report over HTTP: one page, live, for those who may see it."""

import contextlib
import http.client
import signal
import socket
import threading

import pytest

from search.dashboard import live_report as serve
from search.dashboard.live_report import LivePage, PageServer, is_loopback
from uipe_core.errors import UserError

TOKEN = "a-token-of-enough-characters"


@contextlib.contextmanager
def serving(out, **options):
    with PageServer(LivePage(out), **options) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def ask(server, path="/", method="GET", **headers):
    """Status, headers and text of an answer; `Host` is the server's own unless it is given."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    try:
        connection.request(method, path, headers=headers)
        answer = connection.getresponse()
        return answer.status, dict(answer.getheaders()), answer.read().decode()
    finally:
        connection.close()


@pytest.fixture(scope="module")
def server(result):
    with serving(result.out) as running:
        yield running


def test_the_page_is_the_report_and_is_sent_once_while_nothing_changes(server, result):
    status, headers, page = ask(server)
    assert status == 200 and f"<title>{result.store.record.name}: unlearning study</title>" in page
    assert f'data-live="{serve.POLL_SECONDS}"' in page and '<section id="front-table">' in page
    assert headers["X-Frame-Options"] == "DENY" and headers["Referrer-Policy"] == "no-referrer"
    assert headers["Cache-Control"] == "no-store" and headers["Server"] == "uipe"
    assert ask(server, **{"If-None-Match": headers["ETag"]})[0::2] == (304, "")
    assert ask(server, **{"If-None-Match": '"other"'})[0] == 200
    assert ask(server, method="HEAD")[0::2] == (200, "")


@pytest.mark.parametrize(
    "path",
    [
        "/study.json",
        "/study.db",
        "/report/report.html",
        "/..",
        "/../study.json",
        "/%2e%2e/study.json",
        "/index.html",
        "/./",
    ],
)
def test_nothing_but_the_page_is_served(server, path):
    status, _, text = ask(server, path)
    assert status == 404 and text == "only the report is here, at /\n"


@pytest.mark.parametrize(
    "path", ["http://other.example/", "//other.example/", "http://[::1", "/?" + "&".join("a=1" for _ in range(9))]
)
def test_addresses_that_are_no_path_are_refused(server, path):
    with socket.create_connection(("127.0.0.1", server.port), timeout=60) as line:
        line.sendall(f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1:{server.port}\r\nConnection: close\r\n\r\n".encode())
        assert line.makefile("rb").readline().split()[1] in (b"400", b"404")


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS", "BREW"])
def test_only_reading_is_answered(server, method):
    assert ask(server, method=method)[0] == 501


@pytest.mark.parametrize(
    "host", ["other.example", "other.example:{port}", "127.0.0.1", "127.0.0.1:1", "", "127.0.0.1.other.example:{port}", "[::1]"]
)
def test_a_name_of_another_site_for_this_machine_is_refused(server, host):
    status, _, text = ask(server, Host=host.format(port=server.port))
    assert status == 403 and server.address in text


@pytest.mark.parametrize("host", ["localhost:{port}", "LOCALHOST:{port}", "127.0.0.1:{port}", "[::1]:{port}"])
def test_names_of_this_machine_are_answered(server, host):
    assert ask(server, Host=host.format(port=server.port))[0] == 200


def test_bytes_that_are_no_request_do_no_harm(server):
    for sent in (
        b"\x00\xff\xfe\r\n\r\n",
        b"GET\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"GET /" + b"a" * 70000 + b" HTTP/1.1\r\n\r\n",
        b"",
    ):
        with socket.create_connection(("127.0.0.1", server.port), timeout=60) as line:
            line.sendall(sent)
    assert ask(server)[0] == 200


@pytest.mark.parametrize(
    "query", ["", "?token=", "?token", f"?token={TOKEN[:-1]}", f"?token={TOKEN}x", f"?token={TOKEN.upper()}", f"?other={TOKEN}",
              f"?token={TOKEN}&token={TOKEN}", "?token=%ff%fe", "?token=%ED%A0%80", f"?token=%20{TOKEN}"],
)  # fmt: skip
def test_without_its_token_a_page_is_not_shown(result, query):
    with serving(result.out, token=TOKEN) as running:
        status, _, text = ask(running, f"/{query}")
    assert status == 403 and "needs its token" in text and TOKEN not in text


def test_with_its_token_a_page_is_shown_under_any_name(result):
    with serving(result.out, host="0.0.0.0", token=TOKEN) as running:
        assert ask(running, f"/?token={TOKEN}", Host="study.example:9000")[0] == 200
        assert ask(running, f"/study.json?token={TOKEN}")[0] == 404
        assert ask(running, "/study.json")[0] == 403


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.4", "study.example", ""])
def test_a_public_address_without_a_token_is_refused(result, host):
    assert not is_loopback(host)
    with pytest.raises(UserError, match=r"--host .*give --token, of 16 characters or more"):
        PageServer(LivePage(result.out), host)


def test_what_cannot_be_served_is_said(result, tmp_path):
    with pytest.raises(UserError, match="--token: 15 characters can be guessed"):
        PageServer(LivePage(result.out), token="x" * 15)
    with serving(result.out) as running, pytest.raises(UserError, match=f"--port {running.port}: .*choose another"):
        PageServer(LivePage(result.out), port=running.port)
    with pytest.raises(UserError, match="choose another address"):
        PageServer(LivePage(result.out), host="no.such.name.invalid", token=TOKEN)
    with pytest.raises(UserError, match=r"study\.json"):
        LivePage(tmp_path)


def test_a_study_without_trials_is_said_to_have_none_and_the_page_follows(new_store, made_up_evidence, monkeypatch):
    monkeypatch.setattr(serve, "SHARE", 1e9)
    store = new_store()
    page = LivePage(store.out)
    text = page.current().decode()
    assert "No trial is complete yet" in text and "The study is running: models and base runs come first" in text
    assert page.current().decode() == text
    space = store.spec.search_space()
    number, job = store.ask_point(space, {"base": "npo", "epoch": 1, "alpha": 0.5}, "search")
    assert "1 of 9 are being scored" in page.current().decode()
    store.fail(job, number, "the loss <b> is no number")
    text = page.current().decode()
    assert "There is no report yet" in text and "the loss &lt;b&gt; is no number" in text
    for alpha, forgetting in ((0.5, -4.0), (1.0, -2.0)):
        number, job = store.ask_point(space, {"base": "npo", "epoch": 1, "alpha": alpha}, "search")
        store.complete(job, number, made_up_evidence(job, forgetting))
        text = page.current().decode()
        assert f'<tr data-trial="{number}">' in text and "<b>running</b>" in text
    assert "the same command resumes" not in text


def test_a_study_that_goes_away_leaves_a_page_that_says_so(copied, monkeypatch):
    monkeypatch.setattr(serve, "SHARE", 1e9)
    page = LivePage(copied)
    assert b"front-table" in page.current()
    (copied / "study.json").unlink()
    assert b"There is no report yet" in page.current()


def test_the_command_serves_until_it_is_interrupted_and_refuses_what_does_not_fit(copied, launch, call):
    driver = launch("watch", copied, "--port", 0)
    address = driver.until(lambda: next((word for word in driver.stderr.split() if word.startswith("http://")), None))
    port = int(address.rstrip("/").rpartition(":")[2])
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("GET", "/")
    assert b"front-table" in connection.getresponse().read()
    driver.process.send_signal(signal.SIGINT)
    assert driver.wait(60) == 130
    assert "give either --to or --serve" in call("report", copied, "--serve", "--to", copied / "x")[2]
    assert "are for --serve" in call("report", copied, "--port", 1)[2]
    code, _, error = call("report", copied, "--serve", "--host", "0.0.0.0")
    assert code == 2 and "give --token" in error
