"""An exported route in ONNX Runtime Web, from the static page of recipes/browser, in a real browser."""

import functools
import http.server
import os
import shutil
import subprocess
import threading
from pathlib import Path

import numpy as np
import pytest
from browser import open_browser
from versions import needs_export

from restnet_hf import export_routes, load_images
from restnet_hf.demo import DATA, load_demo


pytestmark = [needs_export, pytest.mark.slow]
PAGE = Path(__file__).parents[2] / "recipes" / "browser" / "index.html"
PACKAGE = "onnxruntime-web@1.30.0"
PICTURES = 50
ONE, TWO = ["resnet_fashion[:5] + vit_fashion[6:]"], ["vit_fashion[:]", "resnet_fashion[:7] + vit_fashion[6:]"]
ANSWER = """async bytes => {
    const file = new File([Uint8Array.from(atob(bytes), c => c.charCodeAt(0))], 'x.png', {type: 'image/png'});
    return await window.classify(file);
}"""


@pytest.fixture(scope="module")
def runtime(tmp_path_factory):
    """The files of ONNX Runtime Web, from the npm registry."""
    pytest.importorskip("onnxruntime")
    folder = tmp_path_factory.mktemp("npm")
    npm = shutil.which("npm")
    command = [npm or "npm", "pack", "--silent", PACKAGE]
    done = npm and subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)
    if not done or done.returncode:
        reason = f"needs npm and its registry for {PACKAGE}"
        (pytest.fail if os.environ.get("CI") else pytest.skip)(reason)
    (archive,) = folder.glob("*.tgz")
    shutil.unpack_archive(archive, folder, "gztar", filter="data")
    return folder / "package" / "dist"


class Quiet(http.server.SimpleHTTPRequestHandler):
    def guess_type(self, path):
        return "text/javascript" if str(path).endswith(".mjs") else super().guess_type(path)

    def log_message(self, *_):
        pass


@pytest.fixture(params=[ONE, TWO], ids=["one file", "shared weights"])
def site(request, runtime, tmp_path):
    """A folder as a user serves it: the page, an exported folder and the runtime; and what was exported."""
    exported = export_routes(load_demo(), tmp_path / "board", request.param)
    shutil.copy(PAGE, tmp_path)
    (tmp_path / "ort").mkdir()
    for name in ("ort.wasm.min.mjs", "ort-wasm-simd-threaded.mjs", "ort-wasm-simd-threaded.wasm"):
        shutil.copy(runtime / name, tmp_path / "ort")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(tmp_path)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/index.html", exported, tmp_path
    server.shutdown()
    server.server_close()


def test_the_same_answers_as_in_python(site):
    """Fifty pictures, half of them larger than the network's size: the same five classes in the same order."""
    import base64

    address, exported, folder = site
    rows = load_images(DATA, "test")
    with open_browser() as browser:
        page, errors = browser.new_page(), []
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(address)
        page.wait_for_selector("#picture:enabled", timeout=60_000)
        assert page.inner_text("#route") == str(exported.active_route) and not errors
        off = []
        for number in range(PICTURES):
            picture = rows[number]["image"].convert("RGB")
            if number % 2:
                picture = picture.resize((150 + number, 131))
            path = folder / "picture.png"
            picture.save(path)
            answer = page.evaluate(ANSWER, base64.b64encode(path.read_bytes()).decode())
            expected = exported.predict(path)
            assert [each["label"] for each in answer["classes"]] == [each["label"] for each in expected]
            logits = exported(exported.prepare(path))[0]
            off.append(np.abs(np.array(answer["logits"]) - logits).max() / logits.std())
        assert max(off) < 0.05  # a level of a pixel may be rounded to the other side
        page.set_input_files("#picture", str(path))
        page.wait_for_selector(f"#answer li >> text={expected[0]['label']}")
        (folder / "text.png").write_text("no picture")
        page.set_input_files("#picture", str(folder / "text.png"))
        page.wait_for_selector("#time >> text=cannot be read")
        assert page.locator("#answer li").count() == 0
