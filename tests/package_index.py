"""A package index on this machine that serves small source distributions of matplotlib and
seaborn.
"""

import contextlib
import functools
import hashlib
import http.server
import io
import json
import tarfile
import threading
from collections.abc import Iterator
from pathlib import Path

CHART = """'A demo.'
import matplotlib.pyplot as plt

plt.bar([1, 2], [3, 4], color="{}")
plt.title("Rain")
"""
EXAMPLES = {
    "matplotlib-3.8.4": {
        "LICENSE/LICENSE": "Matplotlib's licence.",
        "galleries/examples/lines/a.py": CHART.format("red")
        + "# %%\nplt.figure()\nplt.pie([1, 2])\n",
        "galleries/examples/lines/b.py": "from matplotlib import animation\n",
        "galleries/plot_types/c.py": CHART.format("red"),
        "galleries/tutorials/d.py": "import matplotlib.pyplot as plt\n\nplt.plot(undefined)\n",
        "lib/matplotlib/e.py": CHART.format("blue"),
    },
    "seaborn-0.13.2": {
        "LICENSE.md": "Seaborn's licence.",
        "examples/f.py": "import seaborn as sns\nsns.load_dataset('tips')\n",
    },
}


def write_sdist(path: Path, root: str):
    with tarfile.open(path, "w:gz") as archive:
        for name, text in EXAMPLES[root].items():
            member = tarfile.TarInfo(f"{root}/{name}")
            member.size = len(text)
            archive.addfile(member, io.BytesIO(text.encode()))


@contextlib.contextmanager
def serve(folder: Path) -> Iterator[str]:
    """Writes both source distributions below `folder` and serves them; gives the index's URL."""
    for root in EXAMPLES:
        project = folder / root.partition("-")[0]
        project.mkdir(parents=True)
        sdist = project / f"{root}.tar.gz"
        write_sdist(sdist, root)
        files = [
            {
                "filename": sdist.name,
                "url": sdist.name,
                "hashes": {"sha256": hashlib.sha256(sdist.read_bytes()).hexdigest()},
            }
        ]
        (project / "index.html").write_text(json.dumps({"files": files}))
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
