"""The server of the explorers: python -m experiments.explore [--port PORT] [--no-browser].

All pages are served by one process, on the loopback address alone. Ctrl-C ends it with status 130.
"""

import argparse
import ast
import html
import os
import socket
import sys
import threading
import webbrowser
from pathlib import Path

from experiments.interrupt import ending_at_once

HERE = Path(__file__).parent
HOST, PORT = "127.0.0.1", 2718

INDEX = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>Explorers</title>
<link rel="icon" href="data:,"><style>
:root {{ color-scheme: light dark; font: 1.05rem/1.5 system-ui, sans-serif }}
body {{ max-width: 44rem; margin: 2rem auto; padding: 0 1rem }}
li {{ margin: .8rem 0 }}
</style></head><body><main><h1>Explorers</h1>
<p>Each page shows one concept, with controls to move and the jprob code that made it.</p>
<ol>{}</ol></main></body></html>"""

# Seen at once, until the page's own script draws something: that takes seconds.
LOADING = """<style>
#root:empty::before { content: "Loading the page"; display: block; padding: 3rem; font: 1.2rem sans-serif }
</style>"""


def pages() -> dict[str, tuple[str, str]]:
    """Name -> (title, subject) of each page, in order, as the first line of its docstring has them."""
    found = {}
    for path in HERE.glob("[a-z]*.py"):
        line = (ast.get_docstring(ast.parse(path.read_text())) or "").splitlines()[0]
        place, _, rest = line.partition(". ")
        title, _, subject = rest.partition(": ")
        found[path.stem] = int(place), title, subject
    return {name: (title, subject) for name, (_, title, subject) in sorted(found.items(), key=lambda item: item[1])}


def index() -> str:
    """The page that links to all others."""
    return INDEX.format(
        "".join(
            f'<li><a href="{name}/">{html.escape(title)}</a><br>{html.escape(subject[0].upper() + subject[1:])}</li>'
            for name, (title, subject) in pages().items()
        )
    )


def application():
    """The ASGI application: the index, and each page in a folder."""
    import marimo
    from starlette.applications import Starlette
    from starlette.responses import HTMLResponse
    from starlette.routing import Mount, Route

    builder = marimo.create_asgi_app(quiet=True, html_head=LOADING)
    for name in pages():
        builder = builder.with_app(path=f"/{name}", root=str(HERE / f"{name}.py"))
    return Starlette(routes=[Route("/", lambda _: HTMLResponse(index())), Mount("/", builder.build())])


def listen(port: int) -> socket.socket:
    """A socket on the port, or on the next one that is free."""
    for candidate in range(port, min(port + 100, 65536)):
        bound = socket.socket()
        # A port of a server that has ended is free at once; Windows would share one that is in use.
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, os.name != "nt")
        try:
            bound.bind((HOST, candidate))
        except OSError:
            bound.close()
            print(f"port {candidate} is in use", file=sys.stderr)
            continue
        bound.listen(128)
        return bound
    raise SystemExit(f"no free port from {port} on")


def open_browser(address: str) -> None:
    """Opens the address, unless a text browser in this terminal would be all there is."""
    screen = sys.platform in ("darwin", "win32") or any(map(os.environ.get, ("DISPLAY", "WAYLAND_DISPLAY", "BROWSER")))
    if screen:
        threading.Thread(target=webbrowser.open, args=(address,), daemon=True).start()


def serve(port: int, browser: bool) -> None:
    """Serves until a signal ends the process."""
    import uvicorn

    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(HERE.parent.parent / ".cache" / "jax"))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    # Loaded once here, not in the first session of a page: its visitor would wait for jax.
    from experiments.explore import _page  # noqa: F401
    from jprob import mle  # noqa: F401

    bound = listen(port)
    address = f"http://{HOST}:{bound.getsockname()[1]}/"
    print(f"explorers: {address} (Ctrl-C ends)", flush=True)
    if browser:
        open_browser(address)
    config = uvicorn.Config(application(), loop="asyncio", log_level="warning", lifespan="off")
    uvicorn.Server(config).run(sockets=[bound])


def main() -> None:
    """Reads the command line and serves."""
    parser = argparse.ArgumentParser(prog="python -m experiments.explore", description="Serve the explorers.")
    parser.add_argument("--port", type=int, default=PORT, help=f"first port to try (default {PORT})")
    parser.add_argument("--no-browser", action="store_true", help="print the address only")
    arguments = parser.parse_args()
    with ending_at_once() as on_interrupt:
        on_interrupt.line = "stopped"
        serve(arguments.port, not arguments.no_browser)


if __name__ == "__main__":
    main()
