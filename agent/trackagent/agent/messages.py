"""Messages that are none: refused as INVALID_ARGUMENT, where gRPC would log a traceback and say UNKNOWN."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import grpc
from google.protobuf.message import DecodeError

WHAT_IS_WRONG = "the message cannot be read: it is none of this protocol's"


class _Unreadable:
    """Stands for a message that cannot be read, until its call is refused."""


class Readable(grpc.aio.ServerInterceptor):  # type: ignore[misc,unused-ignore]
    """Hands only messages that can be read to the services behind it."""

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
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

        async def checked(request: Any, context: Any) -> Any:
            if isinstance(request, _Unreadable):
                await context.abort(grpc.StatusCode.INVALID_ARGUMENT, WHAT_IS_WRONG)
            return await serve(request, context)

        if handler.response_streaming:
            return grpc.unary_stream_rpc_method_handler(checked, read_or(_Unreadable), write)
        return grpc.unary_unary_rpc_method_handler(checked, read_or(_Unreadable), write)
