"""The service: jobs over HTTP, watched and steered from a browser. Extra ``service``.

`create_service` gives an ASGI application; `async-recovery serve` runs it.
"""

from __future__ import annotations

from .app import Service, create_service

__all__ = ["Service", "create_service"]
