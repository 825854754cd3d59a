"""Bodies of requests as items: read within bounds of size and time, and kept in memory.

Starlette writes a file of a multipart body to a temporary file when it has more than 1 MiB; here it never does, since media may
be nobody else's business and a body is bounded anyway.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from fastapi import HTTPException, Request
from pydantic import ValidationError
from pydantic_core import from_json
from starlette.datastructures import Headers, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect

from alphasmith.objectives.media import NamedBytes
from alphasmith.objectives.text import one_line
from alphasmith.search.processing.service._schemas import Texts
from alphasmith.search.processing.service._types import RequestLimits

#: Name of the parts of a multipart body that hold the files.
PART = "file"
#: Largest body of JSON [bytes]: small values of it take many times as much memory when they are read; larger texts come as files.
MOST_JSON = 2 * 2**20
_SHAPE = 'give {"texts": ["..."]}'
_FILES, _TEXTS = "multipart/form-data", "application/json"
#: Longest name of a file that is told again [characters].
_NAME = 200


@dataclass(kw_only=True)
class Bodies:
    """Reads bodies. For one event loop.

    Attributes:
        limits: What requests may ask for.
        texts: Whether JSON with texts is taken beside files.
        held: Bytes of all bodies that are being read or decoded.
    """

    limits: RequestLimits
    texts: bool
    held: int = field(default=0, init=False)

    @asynccontextmanager
    async def items(self, request: Request) -> AsyncIterator[list[tuple[str, NamedBytes | str]]]:
        """Names and contents of a request's items; they count as held until the block ends.

        Raises:
            HTTPException: 400, 408, 413, 415, 422, or 429 where all bodies together are too large.
        """
        kind, most = self._kind(request.headers)
        taken = 0

        async def chunks() -> AsyncGenerator[bytes, None]:
            nonlocal taken
            async for chunk in request.stream():
                if taken + len(chunk) > most:
                    raise _too_large(most)
                if self.held + len(chunk) > self.limits.held:
                    raise HTTPException(429, "too many large requests at once; come again in 1 s", {"Retry-After": "1"})
                self.held += len(chunk)
                taken += len(chunk)
                yield chunk

        try:
            yield await self._read(kind, request.headers, chunks())
        finally:
            self.held -= taken

    async def _read(
        self, kind: str, headers: Headers, chunks: AsyncGenerator[bytes, None]
    ) -> list[tuple[str, NamedBytes | str]]:
        try:
            async with asyncio.timeout(self.limits.upload):
                if kind == _FILES:
                    return await self._files(headers, chunks)
                return self._texts(b"".join([chunk async for chunk in chunks]))
        except TimeoutError as error:
            told = f"the body took longer than {self.limits.upload:g} s; send less at once"
            # Who sends slowly shall not go on with it.
            raise HTTPException(408, told, {"Connection": "close"}) from error
        except ClientDisconnect as error:
            raise HTTPException(400, "the body ended early; send all of it") from error

    def _kind(self, headers: Headers) -> tuple[str, int]:
        """What a body is by its headers, and how large it may be; refuses what need not be read to be refused."""
        if headers.get("content-encoding", "identity").lower() != "identity":
            raise HTTPException(415, "content-encoding: the body is compressed; send it as it is")
        kind = headers.get("content-type", "").partition(";")[0].strip().lower()
        taken = (_FILES, _TEXTS) if self.texts else (_FILES,)
        if kind not in taken:
            told = one_line(kind, 100) or "is missing"
            raise HTTPException(415, f"content-type: {told}; give {' or '.join(taken)}")
        most = self.limits.bytes if kind == _FILES else min(self.limits.bytes, MOST_JSON)
        length = headers.get("content-length", "0")
        if not length.isdecimal() or int(length[:20]) > most:
            raise _too_large(most)
        return kind, most

    def _texts(self, body: bytes) -> list[tuple[str, NamedBytes | str]]:
        try:
            # Of bounded depth, and refuses half a surrogate pair, as our own reader does that walks every value in Python.
            value = from_json(body)
        except ValueError as error:
            raise HTTPException(422, one_line(f"body: is not JSON ({error}); {_SHAPE}", 300)) from error
        texts = value.get("texts") if isinstance(value, dict) else None
        # Before pydantic sees it, which would list everything that is wrong with a million values.
        if not isinstance(texts, list) or len(value) > 1:
            raise HTTPException(422, f"body: is no object with a list texts and nothing else; {_SHAPE}")
        if len(texts) > self.limits.items:
            raise self._too_many(len(texts))
        try:
            return [(str(number), text) for number, text in enumerate(Texts.model_validate(value).texts)]
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            place = ".".join(map(str, first["loc"]))
            raise HTTPException(422, one_line(f"{place}: {first['msg']}; {_SHAPE}", 300)) from error

    def _too_many(self, count: int) -> HTTPException:
        return HTTPException(422, f"{count} items are more than {self.limits.items}; send them in several requests")

    async def _files(self, headers: Headers, body: AsyncGenerator[bytes, None]) -> list[tuple[str, NamedBytes | str]]:
        # Further parts cost as much as files do: a body of nothing but heads of parts shall end at the first that is too many.
        parser = _Parser(headers, body, max_files=self.limits.items, max_fields=1)
        try:
            form = await parser.parse()
        except MultiPartException as error:
            raise HTTPException(400, one_line(f"multipart: {error.message}", 300)) from error
        if not parser.is_whole:
            raise HTTPException(400, "multipart: the last boundary is missing; send all of the body")
        for name, value in form.multi_items():
            if name != PART or not isinstance(value, UploadFile):
                told = f"part {one_line(name, 100)!r} is no file called {PART!r}"
                raise HTTPException(422, f"{told}; send files as parts {PART!r}, with a file name")
        files = [value for _, value in form.multi_items() if isinstance(value, UploadFile)]
        if not files:
            raise HTTPException(422, f"there is no item; send at least one file as part {PART!r}")
        named = [(one_line(file.filename or "", _NAME) or str(number), file) for number, file in enumerate(files)]
        return [(name, NamedBytes(name, await file.read())) for name, file in named]


def _too_large(most: int) -> HTTPException:
    return HTTPException(413, f"the body has more than {most} bytes; send less at once")


class _Parser(MultiPartParser):
    """Keeps files in memory, and knows whether it has seen the end."""

    spool_max_size = 0  # of the standard library's SpooledTemporaryFile: without end
    is_whole = False

    def on_end(self) -> None:
        """The last boundary."""
        self.is_whole = True
