from tests.app.demo_app import ISSUER, MAYA, TOMAS, DemoApp, person


async def test_the_first_log_in_makes_a_user_from_the_token(app: DemoApp) -> None:
    zoe = person("zoe", name=" Zoë Ek ", picture="https://pictures.example/zoe.png")
    user_id = await app.mutation("users:store", zoe)
    me = await app.query("users:me", zoe)
    assert (me.id, me.name, me.avatar) == (user_id, "Zoë Ek", "https://pictures.example/zoe.png")
    assert (me.token_identifier, me.role, me.permissions) == (f"{ISSUER}|zoe", "user", [])


async def test_a_user_without_a_name_is_called_by_the_subject(app: DemoApp) -> None:
    await app.mutation("users:store", person("zoe", name="  "))
    assert (await app.query("users:me", person("zoe"))).name == "zoe"


async def test_a_later_log_in_refreshes_the_same_user(app: DemoApp) -> None:
    first = await app.mutation("users:store", person("zoe", name="Zoe"))
    again = await app.mutation("users:store", person("zoe", name="Zoe Ek"))
    assert again == first
    assert (await app.query("users:me", person("zoe"))).name == "Zoe Ek"


async def test_what_a_token_does_not_say_stays_as_it_was(app: DemoApp) -> None:
    before = await app.query("users:me", MAYA)
    await app.mutation("users:store", MAYA)
    assert await app.query("users:me", MAYA) == before
    assert before.role == "admin"


async def test_a_log_in_that_changes_nothing_re_runs_nothing(app: DemoApp) -> None:
    async with app.subscribed("users:me", TOMAS):
        app.forget_events()
        await app.mutation("users:store", TOMAS)
        await app.idle()
        assert app.run_count("users:me") == 0


async def test_a_very_long_name_is_cut(app: DemoApp) -> None:
    await app.mutation("users:store", person("zoe", name="z" * 101))
    assert (await app.query("users:me", person("zoe"))).name == "z" * 100


async def test_me_is_null_before_the_first_log_in_and_for_anonymous_callers(app: DemoApp) -> None:
    assert await app.query("users:me", person("zoe")) is None
    assert await app.query("users:me") is None


async def test_an_anonymous_caller_cannot_be_stored(app: DemoApp) -> None:
    assert await app.refusal("users:store") == "UNAUTHENTICATED"


async def test_an_operator_gives_and_takes_permissions(app: DemoApp) -> None:
    await app.mutation(
        "users:set_role", token_identifier=TOMAS.token_identifier, role="user", permissions=["write:chat"]
    )
    assert (await app.query("users:me", TOMAS)).permissions == ["write:chat"]
    await app.mutation("users:set_role", token_identifier=TOMAS.token_identifier, role="user")
    assert (await app.query("users:me", TOMAS)).permissions == []


async def test_only_a_stored_user_can_get_a_role(app: DemoApp) -> None:
    arguments = {"token_identifier": f"{ISSUER}|nobody", "role": "admin"}
    assert await app.refusal("users:set_role", **arguments) == "USER_NOT_FOUND"
