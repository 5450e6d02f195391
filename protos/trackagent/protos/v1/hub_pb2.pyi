from trackagent.protos.v1 import agent_pb2 as _agent_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Iterable as _Iterable, Mapping as _Mapping, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class ForwardRequest(_message.Message):
    __slots__ = ("protocol_version", "node", "grants", "parts")
    PROTOCOL_VERSION_FIELD_NUMBER: _ClassVar[int]
    NODE_FIELD_NUMBER: _ClassVar[int]
    GRANTS_FIELD_NUMBER: _ClassVar[int]
    PARTS_FIELD_NUMBER: _ClassVar[int]
    protocol_version: int
    node: str
    grants: _containers.RepeatedCompositeFieldContainer[Grant]
    parts: _containers.RepeatedCompositeFieldContainer[Part]
    def __init__(self, protocol_version: _Optional[int] = ..., node: _Optional[str] = ..., grants: _Optional[_Iterable[_Union[Grant, _Mapping]]] = ..., parts: _Optional[_Iterable[_Union[Part, _Mapping]]] = ...) -> None: ...

class ForwardResponse(_message.Message):
    __slots__ = ("agent_version", "gather_ms")
    AGENT_VERSION_FIELD_NUMBER: _ClassVar[int]
    GATHER_MS_FIELD_NUMBER: _ClassVar[int]
    agent_version: str
    gather_ms: int
    def __init__(self, agent_version: _Optional[str] = ..., gather_ms: _Optional[int] = ...) -> None: ...

class KnownRequest(_message.Message):
    __slots__ = ("protocol_version", "grants", "origin")
    PROTOCOL_VERSION_FIELD_NUMBER: _ClassVar[int]
    GRANTS_FIELD_NUMBER: _ClassVar[int]
    ORIGIN_FIELD_NUMBER: _ClassVar[int]
    protocol_version: int
    grants: _containers.RepeatedCompositeFieldContainer[Grant]
    origin: str
    def __init__(self, protocol_version: _Optional[int] = ..., grants: _Optional[_Iterable[_Union[Grant, _Mapping]]] = ..., origin: _Optional[str] = ...) -> None: ...

class KnownResponse(_message.Message):
    __slots__ = ("last",)
    LAST_FIELD_NUMBER: _ClassVar[int]
    last: int
    def __init__(self, last: _Optional[int] = ...) -> None: ...

class Grant(_message.Message):
    __slots__ = ("run_id", "token")
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    run_id: str
    token: str
    def __init__(self, run_id: _Optional[str] = ..., token: _Optional[str] = ...) -> None: ...

class Part(_message.Message):
    __slots__ = ("origin", "first", "last", "content")
    ORIGIN_FIELD_NUMBER: _ClassVar[int]
    FIRST_FIELD_NUMBER: _ClassVar[int]
    LAST_FIELD_NUMBER: _ClassVar[int]
    CONTENT_FIELD_NUMBER: _ClassVar[int]
    origin: str
    first: int
    last: int
    content: bytes
    def __init__(self, origin: _Optional[str] = ..., first: _Optional[int] = ..., last: _Optional[int] = ..., content: _Optional[bytes] = ...) -> None: ...

class Content(_message.Message):
    __slots__ = ("producers", "columns", "params", "tags", "events", "ends", "losses", "gaps", "metric_records", "history")
    PRODUCERS_FIELD_NUMBER: _ClassVar[int]
    COLUMNS_FIELD_NUMBER: _ClassVar[int]
    PARAMS_FIELD_NUMBER: _ClassVar[int]
    TAGS_FIELD_NUMBER: _ClassVar[int]
    EVENTS_FIELD_NUMBER: _ClassVar[int]
    ENDS_FIELD_NUMBER: _ClassVar[int]
    LOSSES_FIELD_NUMBER: _ClassVar[int]
    GAPS_FIELD_NUMBER: _ClassVar[int]
    METRIC_RECORDS_FIELD_NUMBER: _ClassVar[int]
    HISTORY_FIELD_NUMBER: _ClassVar[int]
    producers: _containers.RepeatedCompositeFieldContainer[_agent_pb2.Producer]
    columns: _containers.RepeatedCompositeFieldContainer[Columns]
    params: _containers.RepeatedCompositeFieldContainer[Setting]
    tags: _containers.RepeatedCompositeFieldContainer[Setting]
    events: _containers.RepeatedCompositeFieldContainer[Event]
    ends: _containers.RepeatedCompositeFieldContainer[End]
    losses: _containers.RepeatedCompositeFieldContainer[Loss]
    gaps: _containers.RepeatedCompositeFieldContainer[Gap]
    metric_records: _containers.RepeatedScalarFieldContainer[int]
    history: bool
    def __init__(self, producers: _Optional[_Iterable[_Union[_agent_pb2.Producer, _Mapping]]] = ..., columns: _Optional[_Iterable[_Union[Columns, _Mapping]]] = ..., params: _Optional[_Iterable[_Union[Setting, _Mapping]]] = ..., tags: _Optional[_Iterable[_Union[Setting, _Mapping]]] = ..., events: _Optional[_Iterable[_Union[Event, _Mapping]]] = ..., ends: _Optional[_Iterable[_Union[End, _Mapping]]] = ..., losses: _Optional[_Iterable[_Union[Loss, _Mapping]]] = ..., gaps: _Optional[_Iterable[_Union[Gap, _Mapping]]] = ..., metric_records: _Optional[_Iterable[int]] = ..., history: bool = ...) -> None: ...

class Columns(_message.Message):
    __slots__ = ("producer", "keys", "steps", "times", "values", "reduced")
    PRODUCER_FIELD_NUMBER: _ClassVar[int]
    KEYS_FIELD_NUMBER: _ClassVar[int]
    STEPS_FIELD_NUMBER: _ClassVar[int]
    TIMES_FIELD_NUMBER: _ClassVar[int]
    VALUES_FIELD_NUMBER: _ClassVar[int]
    REDUCED_FIELD_NUMBER: _ClassVar[int]
    producer: int
    keys: str
    steps: _containers.RepeatedScalarFieldContainer[int]
    times: _containers.RepeatedScalarFieldContainer[int]
    values: bytes
    reduced: bool
    def __init__(self, producer: _Optional[int] = ..., keys: _Optional[str] = ..., steps: _Optional[_Iterable[int]] = ..., times: _Optional[_Iterable[int]] = ..., values: _Optional[bytes] = ..., reduced: bool = ...) -> None: ...

class Setting(_message.Message):
    __slots__ = ("producer", "key", "value", "time_ns")
    PRODUCER_FIELD_NUMBER: _ClassVar[int]
    KEY_FIELD_NUMBER: _ClassVar[int]
    VALUE_FIELD_NUMBER: _ClassVar[int]
    TIME_NS_FIELD_NUMBER: _ClassVar[int]
    producer: int
    key: str
    value: str
    time_ns: int
    def __init__(self, producer: _Optional[int] = ..., key: _Optional[str] = ..., value: _Optional[str] = ..., time_ns: _Optional[int] = ...) -> None: ...

class Event(_message.Message):
    __slots__ = ("producer", "time_ns", "level", "message", "step", "data")
    PRODUCER_FIELD_NUMBER: _ClassVar[int]
    TIME_NS_FIELD_NUMBER: _ClassVar[int]
    LEVEL_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    producer: int
    time_ns: int
    level: str
    message: str
    step: int
    data: str
    def __init__(self, producer: _Optional[int] = ..., time_ns: _Optional[int] = ..., level: _Optional[str] = ..., message: _Optional[str] = ..., step: _Optional[int] = ..., data: _Optional[str] = ...) -> None: ...

class End(_message.Message):
    __slots__ = ("producer", "time_ns", "status", "error", "logged")
    PRODUCER_FIELD_NUMBER: _ClassVar[int]
    TIME_NS_FIELD_NUMBER: _ClassVar[int]
    STATUS_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    LOGGED_FIELD_NUMBER: _ClassVar[int]
    producer: int
    time_ns: int
    status: str
    error: str
    logged: int
    def __init__(self, producer: _Optional[int] = ..., time_ns: _Optional[int] = ..., status: _Optional[str] = ..., error: _Optional[str] = ..., logged: _Optional[int] = ...) -> None: ...

class Loss(_message.Message):
    __slots__ = ("producer", "reason", "records", "more")
    PRODUCER_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    RECORDS_FIELD_NUMBER: _ClassVar[int]
    MORE_FIELD_NUMBER: _ClassVar[int]
    producer: int
    reason: str
    records: int
    more: bool
    def __init__(self, producer: _Optional[int] = ..., reason: _Optional[str] = ..., records: _Optional[int] = ..., more: bool = ...) -> None: ...

class Gap(_message.Message):
    __slots__ = ("producer", "reason", "first_step", "last_step", "first_time_ns", "last_time_ns", "records")
    PRODUCER_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    FIRST_STEP_FIELD_NUMBER: _ClassVar[int]
    LAST_STEP_FIELD_NUMBER: _ClassVar[int]
    FIRST_TIME_NS_FIELD_NUMBER: _ClassVar[int]
    LAST_TIME_NS_FIELD_NUMBER: _ClassVar[int]
    RECORDS_FIELD_NUMBER: _ClassVar[int]
    producer: int
    reason: str
    first_step: int
    last_step: int
    first_time_ns: int
    last_time_ns: int
    records: int
    def __init__(self, producer: _Optional[int] = ..., reason: _Optional[str] = ..., first_step: _Optional[int] = ..., last_step: _Optional[int] = ..., first_time_ns: _Optional[int] = ..., last_time_ns: _Optional[int] = ..., records: _Optional[int] = ...) -> None: ...
