from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Iterable as _Iterable, Mapping as _Mapping, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Producer(_message.Message):
    __slots__ = ("producer_id", "run_id", "attempt", "rank", "local_rank", "world_size", "node", "pid", "start_time_ns", "experiment", "run_name", "forked", "job_time_ns", "sampled", "groups", "reduced")
    class GroupsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
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
    GROUPS_FIELD_NUMBER: _ClassVar[int]
    REDUCED_FIELD_NUMBER: _ClassVar[int]
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
    groups: _containers.ScalarMap[str, str]
    reduced: str
    def __init__(self, producer_id: _Optional[bytes] = ..., run_id: _Optional[str] = ..., attempt: _Optional[int] = ..., rank: _Optional[int] = ..., local_rank: _Optional[int] = ..., world_size: _Optional[int] = ..., node: _Optional[str] = ..., pid: _Optional[int] = ..., start_time_ns: _Optional[int] = ..., experiment: _Optional[str] = ..., run_name: _Optional[str] = ..., forked: bool = ..., job_time_ns: _Optional[int] = ..., sampled: _Optional[str] = ..., groups: _Optional[_Mapping[str, str]] = ..., reduced: _Optional[str] = ...) -> None: ...

class HubAddress(_message.Message):
    __slots__ = ("address", "pin", "token")
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    PIN_FIELD_NUMBER: _ClassVar[int]
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    address: str
    pin: str
    token: str
    def __init__(self, address: _Optional[str] = ..., pin: _Optional[str] = ..., token: _Optional[str] = ...) -> None: ...

class OpenRunRequest(_message.Message):
    __slots__ = ("protocol_version", "producer", "held", "schemas", "hub")
    PROTOCOL_VERSION_FIELD_NUMBER: _ClassVar[int]
    PRODUCER_FIELD_NUMBER: _ClassVar[int]
    HELD_FIELD_NUMBER: _ClassVar[int]
    SCHEMAS_FIELD_NUMBER: _ClassVar[int]
    HUB_FIELD_NUMBER: _ClassVar[int]
    protocol_version: int
    producer: Producer
    held: _containers.RepeatedCompositeFieldContainer[LaneOffset]
    schemas: _containers.RepeatedScalarFieldContainer[bytes]
    hub: HubAddress
    def __init__(self, protocol_version: _Optional[int] = ..., producer: _Optional[_Union[Producer, _Mapping]] = ..., held: _Optional[_Iterable[_Union[LaneOffset, _Mapping]]] = ..., schemas: _Optional[_Iterable[bytes]] = ..., hub: _Optional[_Union[HubAddress, _Mapping]] = ...) -> None: ...

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
    __slots__ = ("agent_version", "pid", "start_time_ns", "directory", "state_directory", "spool", "sinks", "producers", "lost_records", "lost_since_start", "lost_unknown", "quarantine", "listen", "pin", "store")
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
    LISTEN_FIELD_NUMBER: _ClassVar[int]
    PIN_FIELD_NUMBER: _ClassVar[int]
    STORE_FIELD_NUMBER: _ClassVar[int]
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
    listen: str
    pin: str
    store: str
    def __init__(self, agent_version: _Optional[str] = ..., pid: _Optional[int] = ..., start_time_ns: _Optional[int] = ..., directory: _Optional[str] = ..., state_directory: _Optional[str] = ..., spool: _Optional[_Union[SpoolStatus, _Mapping]] = ..., sinks: _Optional[_Iterable[_Union[SinkStatus, _Mapping]]] = ..., producers: _Optional[_Iterable[_Union[ProducerStatus, _Mapping]]] = ..., lost_records: _Optional[_Mapping[str, int]] = ..., lost_since_start: _Optional[int] = ..., lost_unknown: _Optional[str] = ..., quarantine: _Optional[_Union[QuarantineStatus, _Mapping]] = ..., listen: _Optional[str] = ..., pin: _Optional[str] = ..., store: _Optional[str] = ...) -> None: ...

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

class NodeRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class NodeResponse(_message.Message):
    __slots__ = ("agent_version", "node", "time_ns", "readings", "collectors", "gpus", "more_gpus", "runs", "more_ranks", "alarms", "more_alarms", "events")
    class ReadingsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    AGENT_VERSION_FIELD_NUMBER: _ClassVar[int]
    NODE_FIELD_NUMBER: _ClassVar[int]
    TIME_NS_FIELD_NUMBER: _ClassVar[int]
    READINGS_FIELD_NUMBER: _ClassVar[int]
    COLLECTORS_FIELD_NUMBER: _ClassVar[int]
    GPUS_FIELD_NUMBER: _ClassVar[int]
    MORE_GPUS_FIELD_NUMBER: _ClassVar[int]
    RUNS_FIELD_NUMBER: _ClassVar[int]
    MORE_RANKS_FIELD_NUMBER: _ClassVar[int]
    ALARMS_FIELD_NUMBER: _ClassVar[int]
    MORE_ALARMS_FIELD_NUMBER: _ClassVar[int]
    EVENTS_FIELD_NUMBER: _ClassVar[int]
    agent_version: str
    node: str
    time_ns: int
    readings: _containers.ScalarMap[str, float]
    collectors: _containers.RepeatedCompositeFieldContainer[CollectorState]
    gpus: _containers.RepeatedCompositeFieldContainer[GpuState]
    more_gpus: int
    runs: _containers.RepeatedCompositeFieldContainer[RunState]
    more_ranks: int
    alarms: _containers.RepeatedCompositeFieldContainer[Alarm]
    more_alarms: int
    events: _containers.RepeatedCompositeFieldContainer[RunEvent]
    def __init__(self, agent_version: _Optional[str] = ..., node: _Optional[str] = ..., time_ns: _Optional[int] = ..., readings: _Optional[_Mapping[str, float]] = ..., collectors: _Optional[_Iterable[_Union[CollectorState, _Mapping]]] = ..., gpus: _Optional[_Iterable[_Union[GpuState, _Mapping]]] = ..., more_gpus: _Optional[int] = ..., runs: _Optional[_Iterable[_Union[RunState, _Mapping]]] = ..., more_ranks: _Optional[int] = ..., alarms: _Optional[_Iterable[_Union[Alarm, _Mapping]]] = ..., more_alarms: _Optional[int] = ..., events: _Optional[_Iterable[_Union[RunEvent, _Mapping]]] = ...) -> None: ...

class CollectorState(_message.Message):
    __slots__ = ("name", "state", "reason", "since_ns", "sampled_ns")
    NAME_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    SINCE_NS_FIELD_NUMBER: _ClassVar[int]
    SAMPLED_NS_FIELD_NUMBER: _ClassVar[int]
    name: str
    state: str
    reason: str
    since_ns: int
    sampled_ns: int
    def __init__(self, name: _Optional[str] = ..., state: _Optional[str] = ..., reason: _Optional[str] = ..., since_ns: _Optional[int] = ..., sampled_ns: _Optional[int] = ...) -> None: ...

class GpuState(_message.Message):
    __slots__ = ("gpu", "uuid", "name", "mig_profile", "lost", "readings")
    class ReadingsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    GPU_FIELD_NUMBER: _ClassVar[int]
    UUID_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    MIG_PROFILE_FIELD_NUMBER: _ClassVar[int]
    LOST_FIELD_NUMBER: _ClassVar[int]
    READINGS_FIELD_NUMBER: _ClassVar[int]
    gpu: str
    uuid: str
    name: str
    mig_profile: str
    lost: str
    readings: _containers.ScalarMap[str, float]
    def __init__(self, gpu: _Optional[str] = ..., uuid: _Optional[str] = ..., name: _Optional[str] = ..., mig_profile: _Optional[str] = ..., lost: _Optional[str] = ..., readings: _Optional[_Mapping[str, float]] = ...) -> None: ...

class RunState(_message.Message):
    __slots__ = ("run_id", "run_name", "experiment", "attempt", "world_size", "ranks", "loss_key", "losses")
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    RUN_NAME_FIELD_NUMBER: _ClassVar[int]
    EXPERIMENT_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    WORLD_SIZE_FIELD_NUMBER: _ClassVar[int]
    RANKS_FIELD_NUMBER: _ClassVar[int]
    LOSS_KEY_FIELD_NUMBER: _ClassVar[int]
    LOSSES_FIELD_NUMBER: _ClassVar[int]
    run_id: str
    run_name: str
    experiment: str
    attempt: int
    world_size: int
    ranks: _containers.RepeatedCompositeFieldContainer[RankState]
    loss_key: str
    losses: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, run_id: _Optional[str] = ..., run_name: _Optional[str] = ..., experiment: _Optional[str] = ..., attempt: _Optional[int] = ..., world_size: _Optional[int] = ..., ranks: _Optional[_Iterable[_Union[RankState, _Mapping]]] = ..., loss_key: _Optional[str] = ..., losses: _Optional[_Iterable[float]] = ...) -> None: ...

class RankState(_message.Message):
    __slots__ = ("producer_id", "rank", "local_rank", "pid", "connected", "step", "still_seconds", "step_seconds", "score", "cpu_percent", "rss_bytes")
    PRODUCER_ID_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    LOCAL_RANK_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    CONNECTED_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    STILL_SECONDS_FIELD_NUMBER: _ClassVar[int]
    STEP_SECONDS_FIELD_NUMBER: _ClassVar[int]
    SCORE_FIELD_NUMBER: _ClassVar[int]
    CPU_PERCENT_FIELD_NUMBER: _ClassVar[int]
    RSS_BYTES_FIELD_NUMBER: _ClassVar[int]
    producer_id: bytes
    rank: int
    local_rank: int
    pid: int
    connected: bool
    step: int
    still_seconds: float
    step_seconds: float
    score: float
    cpu_percent: float
    rss_bytes: float
    def __init__(self, producer_id: _Optional[bytes] = ..., rank: _Optional[int] = ..., local_rank: _Optional[int] = ..., pid: _Optional[int] = ..., connected: bool = ..., step: _Optional[int] = ..., still_seconds: _Optional[float] = ..., step_seconds: _Optional[float] = ..., score: _Optional[float] = ..., cpu_percent: _Optional[float] = ..., rss_bytes: _Optional[float] = ...) -> None: ...

class Alarm(_message.Message):
    __slots__ = ("rule", "subject", "level", "message", "run_id")
    RULE_FIELD_NUMBER: _ClassVar[int]
    SUBJECT_FIELD_NUMBER: _ClassVar[int]
    LEVEL_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    rule: str
    subject: str
    level: str
    message: str
    run_id: str
    def __init__(self, rule: _Optional[str] = ..., subject: _Optional[str] = ..., level: _Optional[str] = ..., message: _Optional[str] = ..., run_id: _Optional[str] = ...) -> None: ...

class RunEvent(_message.Message):
    __slots__ = ("run_id", "time_ns", "level", "source", "step", "message")
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    TIME_NS_FIELD_NUMBER: _ClassVar[int]
    LEVEL_FIELD_NUMBER: _ClassVar[int]
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    run_id: str
    time_ns: int
    level: str
    source: str
    step: int
    message: str
    def __init__(self, run_id: _Optional[str] = ..., time_ns: _Optional[int] = ..., level: _Optional[str] = ..., source: _Optional[str] = ..., step: _Optional[int] = ..., message: _Optional[str] = ...) -> None: ...

class MeetRequest(_message.Message):
    __slots__ = ("job", "operation", "key", "value", "expected", "amount")
    class Operation(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        GET: _ClassVar[MeetRequest.Operation]
        SET: _ClassVar[MeetRequest.Operation]
        ADD: _ClassVar[MeetRequest.Operation]
        COMPARE_SET: _ClassVar[MeetRequest.Operation]
    GET: MeetRequest.Operation
    SET: MeetRequest.Operation
    ADD: MeetRequest.Operation
    COMPARE_SET: MeetRequest.Operation
    JOB_FIELD_NUMBER: _ClassVar[int]
    OPERATION_FIELD_NUMBER: _ClassVar[int]
    KEY_FIELD_NUMBER: _ClassVar[int]
    VALUE_FIELD_NUMBER: _ClassVar[int]
    EXPECTED_FIELD_NUMBER: _ClassVar[int]
    AMOUNT_FIELD_NUMBER: _ClassVar[int]
    job: str
    operation: MeetRequest.Operation
    key: str
    value: bytes
    expected: bytes
    amount: int
    def __init__(self, job: _Optional[str] = ..., operation: _Optional[_Union[MeetRequest.Operation, str]] = ..., key: _Optional[str] = ..., value: _Optional[bytes] = ..., expected: _Optional[bytes] = ..., amount: _Optional[int] = ...) -> None: ...

class MeetResponse(_message.Message):
    __slots__ = ("found", "value")
    FOUND_FIELD_NUMBER: _ClassVar[int]
    VALUE_FIELD_NUMBER: _ClassVar[int]
    found: bool
    value: bytes
    def __init__(self, found: bool = ..., value: _Optional[bytes] = ...) -> None: ...
