"""Every bound of the engine, in one place, each with its reason.

Each is set under `[limits]` in `engine.toml` by the name it has here. Names end in the unit.
"""

import msgspec


class Limits(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The bounds of one engine; immutable while it runs."""

    # -- one run of a query or mutation: the values of Convex, so that apps move over unchanged
    run_ms_max: int = 1_000  # a run holds the loop: longer ones freeze everybody
    run_slow_ms: int = 5  # a query past this leaves the loop to others at each `ctx.db` call
    read_document_count_max: int = 32_000
    read_size_bytes_max: int = 16 << 20
    read_range_count_max: int = 4_096  # each range is an entry of the invalidation index
    write_document_count_max: int = 16_000
    write_size_bytes_max: int = 16 << 20
    schedule_count_max: int = 1_000  # jobs one run may schedule
    schedule_size_bytes_max: int = 16 << 20  # arguments of all of them
    nesting_depth_max: int = 8  # run_query in run_query in …
    trigger_depth_max: int = 16  # triggers that set off each other
    rate_limit_key_length_max: int = 256  # it may come from a client, and is kept
    search_text_length_max: int = 1_024  # characters that somebody typed
    search_word_count_max: int = 16  # of one search: each is looked up for every document that has the others
    search_match_count_max: int = 1_024  # documents that one search ranks: the newest that match
    log_line_count_max: int = 256  # per run; the rest is counted, not kept
    log_line_size_bytes_max: int = 4_096
    action_seconds_max: int = 600

    # -- values
    arguments_size_bytes_max: int = 8 << 20
    result_size_bytes_max: int = 8 << 20
    document_size_bytes_max: int = 1 << 20
    document_depth_max: int = 16
    value_depth_max: int = 64  # arguments and results: deeper JSON costs stack, not data
    object_field_count_max: int = 1_024
    array_item_count_max: int = 8_192
    field_name_length_max: int = 64
    object_key_length_max: int = 1_024  # clients refuse longer keys in a result

    # -- one connection
    query_count_max: int = 1_000  # subscriptions of one session
    mutation_queue_count_max: int = 256  # then reading from that socket pauses
    action_concurrent_count_max: int = 16
    disconnect_count_max: int = 100  # mutations that one session has registered for its end
    disconnect_grace_ms: int = 10_000  # a client that lost its connection is back by then
    disconnect_grace_closed_ms: int = 2_000  # the same for a tab that was closed: it is back if it was reloaded
    message_size_bytes_max: int = 32 << 20  # below this a client resends for ever what we close on
    message_before_connect_size_bytes_max: int = 64 << 10
    send_buffer_high_water_bytes: int = 64 << 10  # past it the session lags and skips to the newest state
    send_stuck_seconds_max: int = 30
    transition_size_bytes_max: int = 15 << 20  # the PyPI client drops a frame of 16 MiB
    ping_interval_seconds: int = 15
    heartbeat_interval_seconds: int = 20  # WebSocket-level; a dead peer is gone after 1.5 ×
    connect_wait_seconds_max: int = 300  # official clients wait for a token before they say anything
    unconnected_count_max: int = 1_000
    connection_count_max: int = 20_000

    # -- the whole engine
    group_commit_ms_max: int = 5  # how long mutations join one commit while others wait
    group_commit_count_max: int = 512
    mutation_pending_count_max: int = 20_000  # all sessions together; past it: Overloaded
    result_cache_size_bytes: int = 64 << 20  # results that nobody watches at the moment
    result_cache_count_max: int = 10_000
    deflated_cache_size_bytes: int = 4 << 20  # what is being sent, compressed once for all browsers
    deflated_piece_size_bytes_max: int = 1 << 20  # larger results go as they are: compressing 1 MiB holds the loop 9 ms
    wal_checkpoint_size_bytes: int = 4 << 20
    wal_size_bytes_max: int = 1 << 30
    ledger_days: int = 14
    ledger_seconds_after_seen: int = 3_600
    ledger_row_count_max: int = 5_000_000
    ledger_session_count_max: int = 50_000  # whose newest request is known without a look-up: 200 bytes each
    kept_document_count_max: int = 16_384  # in memory, of the newest state; the same number of scans
    kept_document_size_bytes_max: int = 4_096  # larger ones are read anew each time: with the count, 64 MiB
    snapshot_retained_seconds: int = 30  # /api/query_at_ts
    snapshot_retained_interval_seconds: int = 5
    rerun_wait_ms_max: int = 20  # while a result is still on its way to many, how long the next run of its query waits
    moment_interval_ms: int = 10  # moments closer together share a commit: each is an fsync
    scheduler_batch_count: int = 100  # due jobs started at once, so that a backlog starves nobody

    # -- HTTP
    http_body_size_bytes_max: int = 17 << 20
    http_body_seconds_max: int = 30
    http_header_seconds_max: int = 10
    profile_seconds_max: int = 600  # `engine profile`: a request waits for its end
    file_size_bytes_max: int = 20 << 20  # of an upload
    file_upload_seconds_max: int = 120  # from its first byte to its last
    file_upload_count_max: int = 64  # at once: each holds a thread's time and room on the disk
    file_upload_address_seconds: int = 3_600  # how long the address of an upload is good
    file_download_count_max: int = 1_000  # at once: each holds an open file
    route_body_size_bytes_max: int = 1 << 20  # of a request to a route of the app: it is read whole, by anybody's wish
    webhook_delivery_seconds_kept: int = 3 * 86_400  # senders try for three days
    webhook_delivery_count_max: int = 100_000
    webhook_answer_size_bytes_max: int = 64 << 10  # it is kept as long as the delivery
