"""Each threat of the list has tests, by name; the list is that of `SECURITY.md`, which says what stands against it."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# What somebody tries, as in SECURITY.md → the tests that hold what stands against it.
THREATS = {
    "use a visitor's browser against the server": """
        tests/security/test_origins.py::test_once_there_is_a_list_each_of_12_origins_is_let_in_or_refused_at_every_door
        tests/security/test_origins.py::test_without_a_list_any_page_may_ask_and_nothing_ambient_says_who_it_is
        tests/security/test_origins.py::test_a_name_that_was_rebound_to_this_machine_is_another_origin
        tests/auth/test_development.py::test_others_may_not
        tests/server/test_websocket.py::test_an_admin_key_is_taken_from_listed_pages_only
    """,
    "use up memory or time with large, deep, many or slow messages": """
        tests/reliability/test_malformed.py::test_malformed_input_over_sockets_harms_nobody_and_leaves_nothing
        tests/reliability/test_malformed.py::test_a_parser_raises_nothing_but_its_own_error_and_is_quick
        tests/reliability/test_malformed.py::test_an_engine_that_is_broken_is_found_out
        tests/reliability/test_abuse.py::test_an_attacker_meets_the_bounds_and_others_hardly_notice
        tests/reliability/test_slow_clients.py::test_clients_that_do_not_read_hold_little_and_harm_nobody
        tests/server/test_sockets.py::test_a_socket_has_so_long_for_its_header_and_no_longer
        tests/server/test_http.py::test_a_request_that_is_broken_off_leaves_nothing_that_waits_for_its_rest
        tests/server/test_frames.py::test_a_message_past_the_bound_is_refused_when_it_is_announced
        tests/server/test_websocket.py::test_sockets_that_say_nothing_make_room_for_new_ones
        tests/server/test_websocket.py::test_a_client_that_never_reads_again_is_dropped
    """,
    "forge a token, or pass off one that is for somebody else": """
        tests/auth/test_tokens.py::test_a_forged_token_is_refused
        tests/auth/test_tokens.py::test_a_good_token_gives_its_identity
        tests/auth/test_tokens.py::test_the_corpus_is_as_large_as_promised
        tests/auth/test_tokens.py::test_the_identity_ends_with_the_leeway_after_the_expiry
        tests/auth/test_jwks.py::test_rotation_fails_no_log_in
        tests/auth/test_jwks.py::test_unknown_kids_cannot_flood_the_issuer
    """,
    "make the server fetch addresses (SSRF)": """
        tests/auth/test_fetching.py::test_an_address_inside_a_private_network_is_not_reached
        tests/auth/test_fetching.py::test_bounds_are_those_that_are_promised
        tests/test_config.py::test_plain_http_is_for_keys_on_this_machine_while_developing
    """,
    "call internal functions, or find out their names": """
        tests/security/test_function_names.py::test_10_000_names_that_are_no_public_query_are_one_error_and_import_nothing
        tests/security/test_function_names.py::test_an_admin_is_told_apart_by_the_key_alone
    """,
    "become admin": """
        tests/security/test_secrets.py::test_a_key_has_256_bits_and_only_its_digest_lets_it_in
        tests/security/test_secrets.py::test_an_admin_key_in_an_address_or_a_body_is_no_credential
        tests/security/test_secrets.py::test_a_public_address_without_an_admin_key_is_refused_before_anything_starts
        tests/security/test_comparisons.py::test_a_wrong_one_is_compared_in_constant_time
        tests/test_cli.py::test_what_is_wrong_in_the_app_is_exit_code_78
    """,
    "repeat somebody else's request": """
        tests/transaction/test_ledger.py::test_another_request_under_a_recorded_key_is_refused_and_not_run
        tests/transaction/test_ledger.py::test_what_was_asked_cannot_be_shifted_between_identity_path_and_arguments
    """,
    "put SQL into a text": """
        tests/security/test_injection.py::test_no_text_of_a_client_becomes_part_of_a_statement
        tests/security/test_injection.py::test_sql_is_put_together_in_the_modules_that_may_and_nowhere_else
        tests/security/test_injection.py::test_names_of_tables_are_checked_when_they_are_declared
    """,
    "read on with a made-up or foreign cursor": """
        tests/functions/test_pages.py::test_a_cursor_of_another_query_or_other_arguments_is_refused
        tests/functions/test_pages.py::test_a_cursor_of_another_database_is_refused
        tests/functions/test_pages.py::test_a_seal_opens_what_it_sealed_and_nothing_that_was_changed
    """,
    "see results made for others": """
        tests/security/test_identities.py::test_nobody_is_given_what_was_made_for_another
        tests/security/test_identities.py::test_a_cache_that_forgets_who_asked_is_found_out
    """,
    "read files by clever addresses": """
        tests/security/test_traversal.py::test_200_addresses_reach_no_file_and_open_none
        tests/security/test_traversal.py::test_the_address_of_one_file_opens_no_other_however_it_is_bent
        tests/storage/test_files.py::test_only_a_name_of_the_engines_own_becomes_a_path
        tests/functions/test_storage.py::test_an_address_that_was_changed_or_made_elsewhere_is_worth_nothing
    """,
    "get a browser to run an upload": """
        tests/security/test_headers.py::test_an_upload_never_becomes_a_page_of_this_server
        tests/security/test_headers.py::test_no_answer_is_guessed_at_followed_or_asked_for_in_plain_text
        tests/security/test_headers.py::test_the_front_page_is_text_and_runs_nothing_whatever_the_address_holds
    """,
    "learn secrets from errors or logs": """
        tests/security/test_redaction.py::test_no_failure_shows_or_writes_down_a_secret
        tests/observe/test_log.py::test_a_value_cannot_forge_a_line_or_steer_a_terminal
        tests/observe/test_log.py::test_a_line_is_cut_at_4_kib
    """,
    "get credentials from a stolen database or backup": """
        tests/security/test_secrets.py::test_no_credential_is_in_any_file_of_the_database
        tests/storage/test_files.py::test_only_this_user_can_read_files
    """,
    "swap a dependency": """
        tests/security/test_audit.py::test_the_locks_name_every_dependency_at_a_version_that_is_allowed_with_its_hashes
        tests/security/test_audit.py::test_the_locks_name_no_place_to_take_packages_from
        tests/security/test_audit.py::test_the_audit_says_what_it_did
    """,
}


@pytest.mark.parametrize("threat", THREATS)
def test_a_threat_has_tests_that_are_there(threat: str) -> None:
    named = THREATS[threat].split()
    assert named
    for test in named:
        file, _, name = test.partition("::")
        tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
        functions = {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}
        assert name in functions, test


def test_the_list_is_the_one_that_people_read() -> None:
    text = (ROOT / "SECURITY.md").read_text(encoding="utf-8")
    table = text.partition("## What is defended")[2].partition("## What is not defended")[0]
    told = re.findall(r"(?m)^\| (?!Somebody)([^|-][^|]*?) \|", table)
    assert told == list(THREATS)
