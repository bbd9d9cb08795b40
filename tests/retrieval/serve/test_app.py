"""Every endpoint of the server."""

import io
import os
import shutil
import signal
import subprocess
import sys
import time

import httpx
import numpy as np
import pytest
from conftest import draw
from PIL import Image
from qf.pipeline.config import ComputeOptions
from qf.pipeline.workspace import Workspace
from qf.retrieval.journey import index_run
from qf.retrieval.searcher import open_searcher
from qf.retrieval.serve.app import make_app
from qf.retrieval.serve.collection import Cache, Collection, Uploads
from qf.retrieval.serve.limits import HEADERS, Door
from starlette.testclient import TestClient

ON = ComputeOptions("cpu", "float32")
KEY = "green-pole-0.png"


def png(colour="green", shape="pole", size=(64, 48)) -> bytes:
    data = io.BytesIO()
    draw(colour, shape, size).save(data, "PNG")
    return data.getvalue()


@pytest.fixture(scope="module")
def searcher(trained):
    return open_searcher(Workspace(trained), ON)


def keys(answer):
    assert answer.status_code == 200, answer.text
    return [hit["key"] for hit in answer.json()["hits"]]


# ---- the API ----


def test_a_search_gives_what_the_library_gives(client, searcher):
    answer = client.get("/api/search", params={"q": "a red bar", "k": 5})
    hits = searcher.text("a red bar", 5)
    assert keys(answer) == [hit.key for hit in hits]
    first = answer.json()["hits"][0]
    assert first["score"] == hits[0].score
    assert first["row"] == searcher.row(hits[0].key)
    assert first["likely"] is None


def test_composed_queries_take_keys_and_texts(client, searcher):
    one = client.get("/api/search", params={"q": f"2:a red bar + {KEY} - blue", "k": 5})
    other = client.get("/api/search", params={"q": "2:a red bar", "plus": KEY, "minus": "blue", "k": 5})
    assert keys(one) == keys(other)
    assert keys(client.get("/api/search", params={"plus": KEY, "k": 1})) == [KEY]


def test_reranked_hits_have_a_probability(client):
    hits = client.get("/api/search", params={"q": "a red bar", "k": 24, "rerank": True}).json()["hits"]
    assert all(0 <= hit["probability"] <= 1 and hit["likely"] == (hit["probability"] >= 0.5) for hit in hits)


def test_a_split_is_searched_exactly(client, searcher):
    found = keys(client.get("/api/search", params={"q": "a red bar", "k": 200, "split": "val"}))
    everything = [hit.key for hit in searcher.text("a red bar", 200)]
    assert found == [key for key in everything if key.endswith("-1.png")]
    answer = client.get("/api/search", params={"q": "a red bar", "split": "nowhere"})
    assert answer.status_code == 400
    assert "there is no split 'nowhere'; there are train, val" in answer.json()["detail"]


def test_similar_pictures_by_key_and_by_upload(client):
    by_key = keys(client.get("/api/similar", params={"key": KEY, "k": 4}))
    assert by_key[0] == KEY
    assert keys(client.post("/api/similar", params={"k": 4}, content=png())) == by_key
    assert client.get("/api/similar", params={"key": "no such"}).status_code == 400


def test_an_uploaded_picture_is_a_term(client):
    told = client.post("/api/pictures", content=png()).json()
    assert keys(client.get("/api/search", params={"plus": told["name"], "k": 1})) == [KEY]
    small = client.get(told["thumbnail"])
    assert Image.open(io.BytesIO(small.content)).size == (64, 48)
    assert client.get("/api/search", params={"plus": "upload:unknown"}).status_code == 410
    assert client.get("/uploads/upload:unknown").status_code == 410


def test_a_file_of_the_server_is_no_picture_of_a_query(client, searcher, tmp_path):
    draw("green", "pole").save(tmp_path / "x.png")
    as_text = [hit.key for hit in searcher.text(str(tmp_path / "x.png"), 3)]
    assert keys(client.get("/api/search", params={"plus": str(tmp_path / "x.png"), "k": 3})) == as_text


@pytest.mark.parametrize(
    "params",
    [{}, {"q": " "}, {"q": "- snow"}, {"q": "dog +"}, {"minus": "snow"}, {"q": "a - b", "rerank": "1"}, {"q": "a - a"}],
)
def test_a_question_that_is_none_is_one_line(client, params):
    answer = client.get("/api/search", params=params)
    assert answer.status_code == 400
    assert isinstance(answer.json()["detail"], str)
    page = client.get("/", params=params)
    assert page.status_code in (200, 400)


@pytest.mark.parametrize(
    "params", [{"k": 0}, {"k": 100_000}, {"k": "x"}, {"q": "x" * 2000}, {"plus": ["x"] * 40}, {"scorer": "no"}]
)
def test_parameters_have_limits(client, params):
    assert client.get("/api/search", params={"q": "a"} | params).status_code == 422


def test_health_metrics_and_openapi(client):
    assert client.get("/healthz").json() == {"status": "ok"}
    client.get("/api/search", params={"q": "a red bar"})
    client.get("/made/up")
    told = client.get("/metrics").text
    assert 'qf_requests_total{method="GET",route="/api/search",status="200"}' in told
    assert 'route="other",status="404"' in told
    assert "/made/up" not in told
    assert "qf_images 24.0" in told
    assert {"/api/search", "/api/similar", "/healthz", "/metrics"} <= set(client.get("/openapi.json").json()["paths"])


def test_who_asks_is_told_of_words_that_the_models_do_not_know(client):
    answer = client.get("/api/search", params={"q": "a red zeppelin"}).json()
    assert any("does not know 'zeppelin'" in warning for warning in answer["warnings"])
    assert "does not know &#39;zeppelin&#39;" in client.get("/", params={"q": "a red zeppelin"}).text
    assert client.get("/api/search", params={"q": "a red bar"}).json()["warnings"] == []


# ---- pictures ----


def test_pictures_are_served_by_row(client, searcher):
    hit = client.get("/api/search", params={"plus": KEY, "k": 1}).json()["hits"][0]
    small, large = client.get(hit["thumbnail"]), client.get(hit["picture"])
    assert small.content == searcher.index.rows_of(np.array([hit["row"]]))[0]["thumbnail"]
    assert "immutable" in small.headers["cache-control"]
    assert Image.open(io.BytesIO(large.content)).size == (64, 48)
    assert client.get(f"/images/{hit['row']}").headers["cache-control"] == "no-cache"


@pytest.mark.parametrize("row", ["24", "-1", "99999999999999999999999"])
def test_an_image_that_the_index_does_not_name_is_not_served(client, row):
    for address in (f"/images/{row}", f"/images/{row}?size=large", f"/explain/{row}?q=a"):
        assert client.get(address).status_code in (404, 422)


def test_an_image_of_another_build_is_gone(client):
    assert client.get("/images/0?v=old").status_code == 410
    assert client.get("/explain/0?q=a&v=old").status_code == 410


def test_an_original_is_served_only_if_it_is_the_one_in_the_index(collection, tmp_path):
    opened, manifest = collection.opened, collection.opened.searcher.features.manifest
    known = opened.row(opened.searcher.row(KEY))
    source = dict(manifest["source"])
    try:
        manifest["source"] = source | {"path": str(tmp_path / "photos.csv")}
        assert opened._original(KEY, known["thumbnail"]) is None
        draw("green", "pole").save(tmp_path / KEY)
        assert opened._original(KEY, known["thumbnail"]) is not None
        draw("red", "pole").save(tmp_path / KEY)
        assert opened._original(KEY, known["thumbnail"]) is None
        draw("green", "pole").save(tmp_path.parent / KEY)
        for name in (f"../{KEY}", str(tmp_path.parent / KEY), "", None, "\0", "x" * 5000):
            assert opened._original(name, known["thumbnail"]) is None
        (tmp_path / "link.png").symlink_to(tmp_path.parent / KEY)
        assert opened._original("link.png", known["thumbnail"]) is None
    finally:
        manifest["source"] = source
        (tmp_path.parent / KEY).unlink(missing_ok=True)


def test_a_heat_map_is_drawn(client):
    answer = client.get("/explain/0", params={"q": "a red bar"})
    assert Image.open(io.BytesIO(answer.content)).format == "PNG"
    assert client.get("/explain/0", params={"q": " "}).status_code == 400


# ---- the page ----


def test_the_page_works_without_javascript(client):
    page = client.get("/", params={"q": "a red bar", "plus": KEY, "minus": "<b>snow</b>", "split": "train"})
    assert page.status_code == 200
    assert page.text.count('<li class="hit"') == 12
    assert "&lt;b&gt;snow&lt;/b&gt;" in page.text
    assert "<b>snow" not in page.text
    assert f'<input type="hidden" name="plus" value="{KEY}">' in page.text
    assert "<option selected>train</option>" in page.text
    assert 'href="/?q=a+red+bar&amp;minus=%3Cb%3Esnow%3C%2Fb%3E&amp;split=train"' in page.text
    assert "style=" not in page.text
    assert "onclick" not in page.text


def test_the_page_without_a_query_shows_pictures(client):
    page = client.get("/").text
    assert page.count('<li class="hit"') == page.count('class="more"') == 24
    assert 'class="less"' not in page  # there is nothing yet that it could be less of


def test_less_likely_hits_are_folded(client):
    hits = client.get("/api/search", params={"q": "a red bar", "k": 24, "rerank": True}).json()["hits"]
    folded = sum(not hit["likely"] for hit in hits)
    page = client.get("/", params={"q": "a red bar", "k": 24, "rerank": True}).text
    assert (f"Less likely ({folded})" in page) == bool(folded)
    assert "re-ranking waits" in client.get("/", params={"q": "a red bar", "rerank": 1, "minus": "blue"}).text


def test_an_error_is_on_the_page(client):
    page = client.get("/", params={"q": "a red bar +"})
    assert page.status_code == 400
    assert "nothing follows + in the query" in page.text
    assert "upload it again" in client.get("/", params={"plus": "upload:old"}).text


def test_static_files_are_three(client):
    assert client.get("/favicon.ico").content == client.get("/static/icon.svg").content
    for name in ("style.css", "app.js", "icon.svg"):
        assert client.get(f"/static/{name}").status_code == 200
    for name in ("index.html", "..%2fapp.py", "..%2f..%2fsearcher.py"):
        assert client.get(f"/static/{name}").status_code == 404


def test_every_answer_has_the_security_headers(client):
    for address in ("/", "/api/search?q=a", "/api/search", "/none", "/static/app.js", "/images/99", "/healthz"):
        headers = client.get(address).headers
        assert {name: headers[name] for name in HEADERS} == HEADERS
    assert "unsafe" not in HEADERS["Content-Security-Policy"]
    picture = client.get("/images/0").headers
    assert picture["x-content-type-options"] == "nosniff"
    assert "default-src 'none'" in picture["content-security-policy"]
    assert "script-src" not in picture["content-security-policy"]


# ---- who may come in ----


@pytest.fixture
def guarded(collection):
    door = Door("a secret", ("127.0.0.1", "localhost", "::1"))
    with TestClient(make_app(collection, door, 2**20, 8), base_url="http://127.0.0.1:8000") as client:
        yield client


def test_without_the_token_nothing_but_health_is_answered(guarded):
    for address in (
        "/",
        "/api/search?q=a",
        "/metrics",
        "/images/0",
        "/openapi.json",
        "/static/app.js",
        "/?token=wrong",
    ):
        answer = guarded.get(address)
        assert answer.status_code == 401
        assert answer.headers["www-authenticate"] == "Bearer"
    for headers in (
        {"Authorization": "Bearer wrong"},
        {"Authorization": "Basic a secret"},
        {"Cookie": "qf_token=a secret"},
    ):
        assert guarded.get("/", headers=headers).status_code == 401
    assert guarded.get("/healthz").status_code == 200


def test_the_token_is_a_bearer_header_or_becomes_a_cookie(guarded):
    assert guarded.get("/", headers={"Authorization": "Bearer a secret"}).status_code == 200
    assert guarded.get("/").status_code == 401
    answer = guarded.get("/?q=a+red+bar&token=a+secret", follow_redirects=False)
    assert (answer.status_code, answer.headers["location"]) == (303, "/?q=a+red+bar")
    assert "HttpOnly" in answer.headers["set-cookie"]
    assert "a secret" not in answer.headers["set-cookie"]
    assert guarded.get("/").status_code == 200
    answer = guarded.get("//evil.example/x?token=a+secret", follow_redirects=False)
    assert not answer.headers.get("location", "/").startswith("//")


def test_other_names_and_other_sites_are_refused(guarded):
    bearer = {"Authorization": "Bearer a secret"}
    for host in ("evil.example", "evil.example:8000", "", "[::1", "127.0.0.1.evil.example"):
        assert guarded.get("/", headers=bearer | {"Host": host}).status_code == 400
    for host in ("localhost:8000", "[::1]:8000"):
        assert guarded.get("/", headers=bearer | {"Host": host}).status_code == 200
    for headers in ({"Origin": "http://evil.example"}, {"Sec-Fetch-Site": "cross-site"}, {"Origin": "null"}):
        assert guarded.post("/api/pictures", content=png(), headers=bearer | headers).status_code == 403
    own = {"Origin": "http://127.0.0.1:8000", "Sec-Fetch-Site": "same-origin"}
    assert guarded.post("/api/pictures", content=png(), headers=bearer | own).status_code == 200


# ---- a long life ----


def test_a_rebuilt_index_is_taken_up(trained, tmp_path):
    work = shutil.copytree(trained, tmp_path / "work")
    collection = Collection(Workspace(work), ON, 10**6)
    with TestClient(make_app(collection, Door(), 2**20, 8)) as client:
        first = client.get("/api/search", params={"q": "a red bar", "k": 1}).json()["hits"][0]
        assert not collection.refresh()
        (work / "index" / "manifest.json").write_text("{")
        assert not collection.refresh()
        assert client.get(first["picture"]).status_code == 200
        index_run(Workspace(work), None, ON, print)
        end = time.monotonic() + 30
        while client.get(first["picture"]).status_code != 410 and time.monotonic() < end:
            time.sleep(0.1)
        again = client.get("/api/search", params={"q": "a red bar", "k": 1}).json()["hits"][0]
        assert again["key"] == first["key"]
        assert client.get(again["picture"]).status_code == 200
        assert client.get("/metrics").text.count("qf_index_reloads_total 1.0") == 1


def test_a_workspace_without_an_index_is_served_and_its_index_is_taken_up(features, tmp_path):
    shutil.copytree(features.folder, tmp_path / "features")
    collection = Collection(Workspace(tmp_path), ON, 10**6)
    with TestClient(make_app(collection, Door(), 2**20, 8)) as client:
        before = keys(client.get("/api/search", params={"q": "a red bar", "k": 3}))
        assert client.get("/api/search", params={"q": "a red bar", "rerank": 1}).status_code == 400
        assert client.get("/explain/0", params={"q": "a red bar"}).status_code == 400
        assert "re-rank" not in client.get("/").text
        index_run(Workspace(tmp_path), None, ON, print)
        collection.refresh()
        assert keys(client.get("/api/search", params={"q": "a red bar", "k": 3})) == before


def test_caches_forget_what_was_used_least():
    cache = Cache(2)
    for n in range(3):
        cache.put(n, str(n))
        cache.get(1)
    assert [cache.get(n) for n in range(3)] == [None, "1", "2"]
    uploads = Uploads()
    names = {uploads.add(None) for _ in range(300)}
    assert len(names) == 300


def test_the_command_prints_its_address_and_ends_on_an_interrupt(trained):
    command = [sys.executable, "-m", "qf.cli", "serve", "--port", "0", "--workspace", str(trained), "--device", "cpu"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **pipes, env=os.environ | {"OMP_NUM_THREADS": "1"}) as process:
        try:
            line = process.stdout.readline()
            assert line.startswith("serving 24 images at http://127.0.0.1:")
            assert keys(httpx.get(f"{line.split()[4]}/api/search", params={"q": "a red bar", "k": 2}, timeout=60))
            process.send_signal(signal.SIGINT)
            rest, errors = process.communicate(timeout=60)
        finally:
            process.kill()
    assert (rest, process.returncode) == ("", 0), errors
    assert "Traceback" not in errors


def test_an_address_that_is_taken_is_one_line(live, trained):
    command = [sys.executable, "-m", "qf.cli", "serve", "--port", str(live.port), "--workspace", str(trained)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert f"qf: error: cannot listen at 127.0.0.1:{live.port} (" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_without_the_extra_one_line_says_what_to_install(trained):
    code = "import sys; sys.modules['uvicorn'] = None; from qf.cli import main; main()"
    command = [sys.executable, "-c", code, "serve", "--workspace", str(trained)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (1, "qf: error: uvicorn is not installed; pip install 'qf[serve]'\n")
