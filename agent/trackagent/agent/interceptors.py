"""What the gRPC server does to every call, whatever service it is for.

`Discreet`, the outer one, keeps an exception of the agent's own from its caller and puts it into the log.
`Readable` lets only messages that can be read through to the services: others are refused as
INVALID_ARGUMENT, where gRPC would log a traceback and say UNKNOWN.

An interceptor is asked once for each call, and gives the handler that serves it. A service writes the answers
of a stream to its context: so nothing of `Discreet` stands between them and gRPC.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import TYPE_CHECKING, Any

import grpc
from google.protobuf.message import DecodeError

logger = logging.getLogger(__name__)

if TYPE_CHECKING:
    Context = grpc.aio.ServicerContext[object, object]
    # Gives the handler of a call, None where there is no such method.
    Continuation = Callable[[grpc.HandlerCallDetails], Awaitable[Any]]

WHAT_IS_WRONG = "the message cannot be read: it is none of this protocol's"
WHAT_FAILED = "the agent failed: see its log"


class Discreet(grpc.aio.ServerInterceptor):  # type: ignore[misc,unused-ignore]
    """What goes wrong unexpectedly is for the agent's log: gRPC would tell the caller, with whatever the
    exception says of files and of others."""

    async def intercept_service(
        self, continuation: Continuation, handler_call_details: grpc.HandlerCallDetails
    ) -> Any:
        handler = await continuation(handler_call_details)
        if handler is None:
            return None
        method = handler_call_details.method
        codec = handler.request_deserializer, handler.response_serializer
        if handler.unary_unary is not None:

            async def answer(request: object, context: Context) -> object:
                async with _unexpected_is_logged(method, context):
                    return await handler.unary_unary(request, context)

            return grpc.unary_unary_rpc_method_handler(answer, *codec)
        if handler.stream_unary is not None:

            async def take(requests: AsyncIterator[object], context: Context) -> object:
                async with _unexpected_is_logged(method, context):
                    return await handler.stream_unary(requests, context)

            return grpc.stream_unary_rpc_method_handler(take, *codec)
        if handler.stream_stream is not None:

            async def serve(requests: AsyncIterator[object], context: Context) -> None:
                async with _unexpected_is_logged(method, context):
                    await handler.stream_stream(requests, context)

            return grpc.stream_stream_rpc_method_handler(serve, *codec)
        return handler


@contextlib.asynccontextmanager
async def _unexpected_is_logged(method: str, context: Context) -> AsyncIterator[None]:
    try:
        yield
    except grpc.aio.BaseError:
        raise  # an answer of ours, or gRPC's own word of a call whose caller is gone
    except Exception:
        logger.exception("%s failed", method)
        await context.abort(grpc.StatusCode.INTERNAL, WHAT_FAILED)


class Readable(grpc.aio.ServerInterceptor):  # type: ignore[misc,unused-ignore]
    """Hands only messages that can be read to the services behind it."""

    async def intercept_service(
        self, continuation: Continuation, handler_call_details: grpc.HandlerCallDetails
    ) -> Any:
        handler = await continuation(handler_call_details)
        if handler is None:
            return None
        read, write = handler.request_deserializer, handler.response_serializer

        def read_or(instead: Callable[[], Any]) -> Callable[[bytes], Any]:
            def tolerant(data: bytes) -> Any:
                try:
                    return read(data)
                except DecodeError:
                    return instead()

            return tolerant

        if handler.request_streaming:
            # In a stream an empty one stands for it, which the service refuses like any batch of nothing.
            return grpc.stream_stream_rpc_method_handler(
                handler.stream_stream, read_or(lambda: read(b"")), write
            )
        serve = handler.unary_stream if handler.response_streaming else handler.unary_unary

        async def checked(request: Any, context: Context) -> Any:
            if isinstance(request, _Unreadable):
                await context.abort(grpc.StatusCode.INVALID_ARGUMENT, WHAT_IS_WRONG)
            return await serve(request, context)

        if handler.response_streaming:
            return grpc.unary_stream_rpc_method_handler(checked, read_or(_Unreadable), write)
        return grpc.unary_unary_rpc_method_handler(checked, read_or(_Unreadable), write)


class _Unreadable:
    """Stands for a message that cannot be read, until its call is refused."""
