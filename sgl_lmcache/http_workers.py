"""SGLang's HTTP application with our endpoints, for a server of several HTTP processes (`--tokenizer-worker-num`).

They load no plugins. Each imports the application by the name in `SGLANG_HTTP_SERVER_APP_PATH`, which `endpoints` makes
this one. An answer goes to the process that has asked, so each has a desk of its own.
"""

from sglang.srt.entrypoints.http_server import app, get_global_state

from sgl_lmcache.endpoints import add_routes

__all__ = ["app"]

add_routes(app, get_global_state)
