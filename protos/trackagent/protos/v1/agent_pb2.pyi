from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Iterable as _Iterable, Mapping as _Mapping, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Producer(_message.Message):
    __slots__ = ("producer_id", "run_id", "attempt", "rank", "local_rank", "world_size", "node", "pid", "start_time_ns", "experiment", "run_name", "forked", "job_time_ns", "sampled")
    PRODUCER_ID_FIELD_NUMBER: _ClassVar[int]
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    LOCAL_RANK_FIELD_NUMBER: _ClassVar[int]
    WORLD_SIZE_FIELD_NUMBER: _ClassVar[int]
    NODE_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    START_TIME_NS_FIELD_NUMBER: _ClassVar[int]
    EXPERIMENT_FIELD_NUMBER: _ClassVar[int]
    RUN_NAME_FIELD_NUMBER: _ClassVar[int]
    FORKED_FIELD_NUMBER: _ClassVar[int]
    JOB_TIME_NS_FIELD_NUMBER: _ClassVar[int]
    SAMPLED_FIELD_NUMBER: _ClassVar[int]
    producer_id: bytes
    run_id: str
    attempt: int
    rank: int
    local_rank: int
    world_size: int
    node: str
    pid: int
    start_time_ns: int
    experiment: str
    run_name: str
    forked: bool
    job_time_ns: int
    sampled: str
    def __init__(self, producer_id: _Optional[bytes] = ..., run_id: _Optional[str] = ..., attempt: _Optional[int] = ..., rank: _Optional[int] = ..., local_rank: _Optional[int] = ..., world_size: _Optional[int] = ..., node: _Optional[str] = ..., pid: _Optional[int] = ..., start_time_ns: _Optional[int] = ..., experiment: _Optional[str] = ..., run_name: _Optional[str] = ..., forked: bool = ..., job_time_ns: _Optional[int] = ..., sampled: _Optional[str] = ...) -> None: ...

class OpenRunRequest(_message.Message):
    __slots__ = ("protocol_version", "producer", "held", "schemas")
    PROTOCOL_VERSION_FIELD_NUMBER: _ClassVar[int]
    PRODUCER_FIELD_NUMBER: _ClassVar[int]
    HELD_FIELD_NUMBER: _ClassVar[int]
    SCHEMAS_FIELD_NUMBER: _ClassVar[int]
    protocol_version: int
    producer: Producer
    held: _containers.RepeatedCompositeFieldContainer[LaneOffset]
    schemas: _containers.RepeatedScalarFieldContainer[bytes]
    def __init__(self, protocol_version: _Optional[int] = ..., producer: _Optional[_Union[Producer, _Mapping]] = ..., held: _Optional[_Iterable[_Union[LaneOffset, _Mapping]]] = ..., schemas: _Optional[_Iterable[bytes]] = ...) -> None: ...

class OpenRunResponse(_message.Message):
    __slots__ = ("agent_version", "max_batch_bytes", "committed")
    AGENT_VERSION_FIELD_NUMBER: _ClassVar[int]
    MAX_BATCH_BYTES_FIELD_NUMBER: _ClassVar[int]
    COMMITTED_FIELD_NUMBER: _ClassVar[int]
    agent_version: str
    max_batch_bytes: int
    committed: _containers.RepeatedCompositeFieldContainer[LaneOffset]
    def __init__(self, agent_version: _Optional[str] = ..., max_batch_bytes: _Optional[int] = ..., committed: _Optional[_Iterable[_Union[LaneOffset, _Mapping]]] = ...) -> None: ...

class LaneOffset(_message.Message):
    __slots__ = ("lane", "offset")
    LANE_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    lane: int
    offset: int
    def __init__(self, lane: _Optional[int] = ..., offset: _Optional[int] = ...) -> None: ...

class PushRequest(_message.Message):
    __slots__ = ("producer_id", "lane", "first_offset", "journal_bytes")
    PRODUCER_ID_FIELD_NUMBER: _ClassVar[int]
    LANE_FIELD_NUMBER: _ClassVar[int]
    FIRST_OFFSET_FIELD_NUMBER: _ClassVar[int]
    JOURNAL_BYTES_FIELD_NUMBER: _ClassVar[int]
    producer_id: bytes
    lane: int
    first_offset: int
    journal_bytes: bytes
    def __init__(self, producer_id: _Optional[bytes] = ..., lane: _Optional[int] = ..., first_offset: _Optional[int] = ..., journal_bytes: _Optional[bytes] = ...) -> None: ...

class PushResponse(_message.Message):
    __slots__ = ("lane", "offset")
    LANE_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    lane: int
    offset: int
    def __init__(self, lane: _Optional[int] = ..., offset: _Optional[int] = ...) -> None: ...

class CloseRunRequest(_message.Message):
    __slots__ = ("producer_id", "ends")
    PRODUCER_ID_FIELD_NUMBER: _ClassVar[int]
    ENDS_FIELD_NUMBER: _ClassVar[int]
    producer_id: bytes
    ends: _containers.RepeatedCompositeFieldContainer[LaneOffset]
    def __init__(self, producer_id: _Optional[bytes] = ..., ends: _Optional[_Iterable[_Union[LaneOffset, _Mapping]]] = ...) -> None: ...

class CloseRunResponse(_message.Message):
    __slots__ = ("complete",)
    COMPLETE_FIELD_NUMBER: _ClassVar[int]
    complete: bool
    def __init__(self, complete: bool = ...) -> None: ...

class StatusRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class StatusResponse(_message.Message):
    __slots__ = ("agent_version", "pid", "start_time_ns", "directory", "state_directory", "spool", "sinks", "producers", "lost_records", "lost_since_start", "lost_unknown", "quarantine")
    class LostRecordsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    AGENT_VERSION_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    START_TIME_NS_FIELD_NUMBER: _ClassVar[int]
    DIRECTORY_FIELD_NUMBER: _ClassVar[int]
    STATE_DIRECTORY_FIELD_NUMBER: _ClassVar[int]
    SPOOL_FIELD_NUMBER: _ClassVar[int]
    SINKS_FIELD_NUMBER: _ClassVar[int]
    PRODUCERS_FIELD_NUMBER: _ClassVar[int]
    LOST_RECORDS_FIELD_NUMBER: _ClassVar[int]
    LOST_SINCE_START_FIELD_NUMBER: _ClassVar[int]
    LOST_UNKNOWN_FIELD_NUMBER: _ClassVar[int]
    QUARANTINE_FIELD_NUMBER: _ClassVar[int]
    agent_version: str
    pid: int
    start_time_ns: int
    directory: str
    state_directory: str
    spool: SpoolStatus
    sinks: _containers.RepeatedCompositeFieldContainer[SinkStatus]
    producers: _containers.RepeatedCompositeFieldContainer[ProducerStatus]
    lost_records: _containers.ScalarMap[str, int]
    lost_since_start: int
    lost_unknown: str
    quarantine: QuarantineStatus
    def __init__(self, agent_version: _Optional[str] = ..., pid: _Optional[int] = ..., start_time_ns: _Optional[int] = ..., directory: _Optional[str] = ..., state_directory: _Optional[str] = ..., spool: _Optional[_Union[SpoolStatus, _Mapping]] = ..., sinks: _Optional[_Iterable[_Union[SinkStatus, _Mapping]]] = ..., producers: _Optional[_Iterable[_Union[ProducerStatus, _Mapping]]] = ..., lost_records: _Optional[_Mapping[str, int]] = ..., lost_since_start: _Optional[int] = ..., lost_unknown: _Optional[str] = ..., quarantine: _Optional[_Union[QuarantineStatus, _Mapping]] = ...) -> None: ...

class QuarantineStatus(_message.Message):
    __slots__ = ("items", "bytes", "max_bytes", "deleted")
    ITEMS_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    MAX_BYTES_FIELD_NUMBER: _ClassVar[int]
    DELETED_FIELD_NUMBER: _ClassVar[int]
    items: int
    bytes: int
    max_bytes: int
    deleted: int
    def __init__(self, items: _Optional[int] = ..., bytes: _Optional[int] = ..., max_bytes: _Optional[int] = ..., deleted: _Optional[int] = ...) -> None: ...

class SpoolStatus(_message.Message):
    __slots__ = ("batches", "bytes", "received_bytes", "max_bytes")
    BATCHES_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    RECEIVED_BYTES_FIELD_NUMBER: _ClassVar[int]
    MAX_BYTES_FIELD_NUMBER: _ClassVar[int]
    batches: int
    bytes: int
    received_bytes: int
    max_bytes: int
    def __init__(self, batches: _Optional[int] = ..., bytes: _Optional[int] = ..., received_bytes: _Optional[int] = ..., max_bytes: _Optional[int] = ...) -> None: ...

class SinkStatus(_message.Message):
    __slots__ = ("name", "state", "batches_behind", "rejected", "error", "dead_letters", "dead_letter_bytes")
    NAME_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    BATCHES_BEHIND_FIELD_NUMBER: _ClassVar[int]
    REJECTED_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    DEAD_LETTERS_FIELD_NUMBER: _ClassVar[int]
    DEAD_LETTER_BYTES_FIELD_NUMBER: _ClassVar[int]
    name: str
    state: str
    batches_behind: int
    rejected: int
    error: str
    dead_letters: int
    dead_letter_bytes: int
    def __init__(self, name: _Optional[str] = ..., state: _Optional[str] = ..., batches_behind: _Optional[int] = ..., rejected: _Optional[int] = ..., error: _Optional[str] = ..., dead_letters: _Optional[int] = ..., dead_letter_bytes: _Optional[int] = ...) -> None: ...

class ProducerStatus(_message.Message):
    __slots__ = ("producer", "state", "committed_bytes")
    PRODUCER_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    COMMITTED_BYTES_FIELD_NUMBER: _ClassVar[int]
    producer: Producer
    state: str
    committed_bytes: int
    def __init__(self, producer: _Optional[_Union[Producer, _Mapping]] = ..., state: _Optional[str] = ..., committed_bytes: _Optional[int] = ...) -> None: ...
