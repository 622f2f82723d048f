"""Every bound of the engine, in one place, each with its reason.

Each is set under `[limits]` in `engine.toml` by the name it has here. Names end in the unit. A comment has the reason,
and after `=>` what is met past the bound: the code of an error, of a close or of a status, or what is done instead.
`docs/limits.md` is made of this by `python docs/limits.py`.
"""

import msgspec


class Limits(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The bounds of one engine; immutable while it runs."""

    # -- one run of a query or mutation: the values of Convex, so that apps move over unchanged
    run_ms_max: int = 1_000  # a run holds the loop: longer ones freeze everybody => LimitExceeded
    run_slow_ms: int = 5  # a query past this leaves the loop to others at each `ctx.db` call
    read_document_count_max: int = 32_000  # a run holds the loop while it reads => LimitExceeded
    read_size_bytes_max: int = 16 << 20  # of documents, in memory at once => LimitExceeded
    read_range_count_max: int = 4_096  # each range is an entry of the invalidation index => LimitExceeded
    write_document_count_max: int = 16_000  # each is a row and its index entries => LimitExceeded
    write_size_bytes_max: int = 16 << 20  # it is in memory and in the WAL until the commit => LimitExceeded
    schedule_count_max: int = 1_000  # jobs one run may schedule => LimitExceeded
    schedule_job_size_bytes_max: int = 4 << 20  # arguments of one of them => LimitExceeded
    schedule_size_bytes_max: int = 16 << 20  # arguments of all of them => LimitExceeded
    nesting_depth_max: int = 8  # run_query in run_query in … => LimitExceeded
    trigger_depth_max: int = 16  # triggers that set off each other => LimitExceeded
    rate_limit_key_length_max: int = 256  # it may come from a client, and is kept => LimitExceeded
    search_text_length_max: int = 1_024  # characters that somebody typed => LimitExceeded
    search_word_count_max: int = 16  # each is looked up for every document that has the others => LimitExceeded
    search_match_count_max: int = 1_024  # documents that one search ranks => the newest that match are ranked
    log_line_count_max: int = 256  # of one run => the rest is counted, not kept
    log_line_size_bytes_max: int = 4_096  # of one line => the rest is cut off
    action_seconds_max: int = 600  # an action holds nobody, but its caller waits => LimitExceeded

    # -- values
    arguments_size_bytes_max: int = 8 << 20  # decoding holds the loop => LimitExceeded
    result_size_bytes_max: int = 8 << 20  # it is kept, compared and sent => LimitExceeded
    document_size_bytes_max: int = 1 << 20  # a row is read and written whole => LimitExceeded
    document_depth_max: int = 16  # nested values of a field => InvalidDocument
    value_depth_max: int = 64  # deeper JSON costs stack, not data => InvalidArgument, InvalidResult
    object_field_count_max: int = 1_024  # of one object => InvalidArgument, InvalidResult
    array_item_count_max: int = 8_192  # of one array => InvalidArgument, InvalidResult
    field_name_length_max: int = 64  # of a table => SchemaError
    object_key_length_max: int = 1_024  # clients refuse longer keys in a result => InvalidResult

    # -- one connection
    query_count_max: int = 1_000  # subscriptions of one session => LimitExceeded; twice as many: close 1013
    subscription_burst_count: int = 500  # queries added at once, besides those that a client comes with
    subscription_rate_per_second: int = 100  # after the burst => reading from that socket pauses
    mutation_queue_count_max: int = 256  # requests of one session that wait => reading from that socket pauses
    action_concurrent_count_max: int = 16  # of one session => the others wait
    disconnect_count_max: int = 100  # mutations that one session has registered for its end => LimitExceeded
    disconnect_grace_ms: int = 10_000  # a client that lost its connection is back by then
    disconnect_grace_closed_ms: int = 2_000  # the same for a tab that was closed: it is back if it was reloaded
    message_size_bytes_max: int = 32 << 20  # below this a client resends for ever what we close on => close 1009
    message_before_connect_size_bytes_max: int = 64 << 10  # nobody is known yet => close 1009
    send_buffer_high_water_bytes: int = 64 << 10  # unsent => the session lags, and skips to the newest state
    send_stuck_seconds_max: int = 30  # without getting rid of a byte => aborted
    send_unsent_size_bytes_max: int = 40 << 20  # of all that lag, in memory twice => the one with most is aborted
    socket_send_buffer_size_bytes: int = 256 << 10  # the kernel would take 4 MB for a client that has stopped reading
    close_seconds_max: int = 2  # for the close handshake => aborted
    transition_size_bytes_max: int = 15 << 20  # the PyPI client drops 16 MiB => several Transitions, or chunks
    ping_interval_seconds: int = 15  # of silence; official clients give up after 30 and 60 s => Ping
    heartbeat_interval_seconds: int = 20  # a silent peer is pinged, and after half as long again => aborted
    connect_wait_seconds_max: int = 300  # official clients wait for a token before they say anything => close 1000
    unconnected_count_max: int = 1_000  # have said nothing yet => the oldest is closed: 1013
    connection_count_max: int = 20_000  # WebSockets; at most what the system lets it open => Overloaded (503)

    # -- the whole engine
    loop_held_dump_seconds: int = 5  # by a call that blocks: then where it stands is logged
    loop_held_seconds_max: int = 30  # then `engine serve` ends, to be started again: clients give up after 60 s
    group_commit_ms_max: int = 5  # how long mutations join one commit while others wait => the next commit
    group_commit_count_max: int = 512  # mutations of one commit => the next commit
    mutation_pending_count_max: int = 20_000  # all sessions together => Overloaded
    result_cache_size_bytes: int = 64 << 20  # results that nobody watches at the moment => the least recently used goes
    result_cache_count_max: int = 10_000  # the same in number
    deflated_cache_size_bytes: int = 4 << 20  # what is being sent, compressed once for all browsers => the oldest goes
    deflated_piece_size_bytes_max: int = 1 << 20  # larger results go as they are: compressing 1 MiB holds the loop 9 ms
    wal_checkpoint_size_bytes: int = 4 << 20  # of the WAL => a checkpoint, between two commits
    wal_kept_size_bytes: int = 64 << 20  # of a WAL file that grew => it is cut once all of it is checkpointed
    wal_pinned_size_bytes_max: int = 256 << 20  # held back by runs that read an old snapshot => those: LimitExceeded
    wal_size_bytes_max: int = 1 << 30  # what readers of old snapshots hold back => no snapshot is retained: Overloaded
    free_size_bytes_min: int = 64 << 20  # on the disk of the database, for making room => StorageFull
    ledger_days: int = 14  # outcomes that nobody surely saw are kept so long
    ledger_seconds_after_seen: int = 3_600  # and those that their client has seen
    ledger_row_count_max: int = 5_000_000  # outcomes; a start looks a million through in 0.5 s => Overloaded
    ledger_session_count_max: int = 50_000  # whose newest request is known without a look-up: 200 bytes each
    kept_document_count_max: int = 16_384  # in memory, and as many scans => others are read anew
    kept_document_size_bytes_max: int = 4_096  # larger ones are read anew each time: with the count, 64 MiB
    snapshot_old_seconds_max: int = 5  # a run that reads an old one holds back the checkpoint => LimitExceeded
    snapshot_retained_seconds: int = 30  # for /api/query_at_ts => RequestError
    snapshot_retained_interval_seconds: int = 5  # askers within it share one snapshot
    pass_share_ms: int = 20  # of all re-runs after a commit, for one session => its others run in rounds
    rerun_wait_ms_max: int = 20  # while a result is still on its way to many, how long the next run of its query waits
    moment_interval_ms: int = 10  # moments closer together share a commit: each is an fsync
    scheduler_batch_count: int = 100  # due jobs started at once, so that a backlog starves nobody
    scheduler_mutation_count: int = 16  # of them in the queue of mutations: a client's waits behind no more

    # -- HTTP
    http_body_size_bytes_max: int = 17 << 20  # two official clients send arguments of 16 MiB => 413
    http_body_seconds_max: int = 30  # from the header to its end => 408
    http_header_seconds_max: int = 10  # from the connection to the end of the header => closed
    http_header_field_size_bytes_max: int = 17 << 10  # an admin key with an identity to act as => 400
    http_header_field_count_max: int = 128  # of one request => 400
    http_keep_alive_seconds: int = 75  # longer than usual proxies wait => closed
    http_connection_count_max: int = 4_096  # besides WebSockets => the oldest that asks nothing is closed
    authentication_failure_count_max: int = 10  # on one connection => closed
    profile_seconds_max: int = 600  # `engine profile`: a request waits for its end => InvalidArgument
    file_size_bytes_max: int = 20 << 20  # of an upload => 413
    file_upload_seconds_max: int = 120  # from its first byte to its last => 408
    file_upload_count_max: int = 64  # at once: each holds a thread's time and room on the disk => Overloaded
    file_upload_address_seconds: int = 3_600  # how long the address of an upload is good => Forbidden
    file_download_count_max: int = 1_000  # at once: each holds an open file => Overloaded
    route_body_size_bytes_max: int = 1 << 20  # to a route of the app: it is read whole for anybody => 413
    webhook_delivery_seconds_kept: int = 3 * 86_400  # senders try for three days
    webhook_delivery_count_max: int = 100_000  # of all senders => the oldest goes
    webhook_answer_size_bytes_max: int = 64 << 10  # it is kept as long as the delivery => it is not kept


class PerIp(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The bounds of each client address: `[per_ip]` in `engine.toml`. Without that table, and on loopback, none."""

    connection_count_max: int = 1_000  # WebSockets open at once: an office has one address => Overloaded (503)
    connection_rate_per_second: int = 50  # new WebSockets => RateLimited (429)
    authentication_failure_count_max: int = 30  # in a minute => its credentials are RateLimited (429; close 1013)
    refusal_seconds: int = 60  # for so long none of its credentials is looked at
