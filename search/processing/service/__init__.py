"""The service: a model behind HTTP, with bounded requests, dynamic batching and a stop in good order.

- ``_application``: the service as an ASGI application: routes, what they refuse, and how long an answer may take
- ``_batching``: items of many requests, taken together into one forward call in one worker thread
- ``_bodies``: bodies of requests as items: read within bounds of size and time, and kept in memory
- ``_connections``: connections of uvicorn under the rules that the dashboard's have
- ``_front``: access, hardened answers, and the count of requests
- ``_metrics``: what the service tells Prometheus
- ``_schemas``: bodies of requests and answers, as the OpenAPI page shows them
- ``_types``: what is served, as the service sees it, and what a request may ask for
- ``_warming``: a first answer before the first request
- ``server``: the service behind the access rules, on uvicorn, until it is told to stop
"""

__all__ = ["server"]
