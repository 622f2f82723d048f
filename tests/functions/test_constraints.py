"""Constraints as functions meet them: typed errors that they may catch, cascades that subscribers see, defaults."""

from pathlib import Path
from textwrap import dedent
from typing import Any

import msgspec
import pytest

from engine.errors import ConstraintViolation, ForeignKeyViolation, InvalidDocument, SchemaError, UniqueViolation
from engine.transaction.transaction import WriteTransaction
from tests.functions.apps import open_app
from tests.small_engine import person

SCHEMA = """
    from typing import Annotated
    from uuid import uuid4
    from msgspec import Meta, field
    from engine import *

    class User(Table, name="users"):
        name: Annotated[str, Meta(min_length=1, max_length=5)]
        age: Annotated[int, Meta(ge=0)] = 0
        by_name = unique("name")

    class Game(Table, name="games"):
        title: str = ""

    class Post(Table, name="posts"):
        game_id: Id[Game]
        user_id: Id[User] | None = None
        text: str = ""
        tags: list[str] = []
        token: str = field(default_factory=lambda: uuid4().hex)
        updated_at: UpdatedAt = 0.0
        by_game = index("game_id")
        by_user = index("user_id")
        game = foreign_key("game_id", on_delete="cascade")
        user = foreign_key("user_id", on_delete="set_null")

    class Vote(Table, name="votes"):
        post_id: Id[Post]
        user_id: Id[User] | None = None
        by_post_user = unique("post_id", "user_id")
        by_user = index("user_id")
        post = foreign_key("post_id", on_delete="cascade")
        user = foreign_key("user_id")
"""

FUNCTIONS = """
    @mutation
    async def add_user(ctx, name: str, age: int = 0) -> str:
        return await ctx.db.insert(User(name=name, age=age))

    @mutation
    async def add_game(ctx) -> str:
        return await ctx.db.insert(Game())

    @mutation
    async def add_post(ctx, game: Id[Game], user: Id[User] | None = None, text: str = "") -> str:
        return await ctx.db.insert(Post(game_id=game, user_id=user, text=text))

    @mutation
    async def add_vote(ctx, post: Id[Post], user: Id[User] | None = None) -> str:
        return await ctx.db.insert(Vote(post_id=post, user_id=user))

    @mutation
    async def patch(ctx, id: str, fields: dict[str, Any]) -> None:
        await ctx.db.patch(id, **fields)

    @mutation
    async def delete(ctx, id: str) -> None:
        await ctx.db.delete(id)

    @query
    async def posts(ctx, game: Id[Game]) -> list[str]:
        return [post.text async for post in ctx.db.query(Post.by_game, game_id=game)]

    @query
    async def post(ctx, id: Id[Post]) -> Post | None:
        return await ctx.db.get(id)

    @query
    async def votes(ctx, post: Id[Post]) -> int:
        return await ctx.db.query(Vote.by_post_user, post_id=post).count()
"""


def code(*parts: str) -> str:
    """One module of these parts, each indented in its own way."""
    return "\n".join(map(dedent, parts))


# -- errors


@pytest.mark.parametrize(
    ("error", "path", "arguments", "field", "value"),
    [
        (UniqueViolation, "m:add_user", {"name": "ann"}, "name", "ann"),
        (InvalidDocument, "m:add_user", {"name": ""}, "name", ""),
        (InvalidDocument, "m:add_user", {"name": "too long"}, "name", "too long"),
        (InvalidDocument, "m:add_user", {"name": "bob", "age": -1}, "age", -1),
        (InvalidDocument, "m:patch", {"fields": {"age": "old"}}, "age", "old"),
        (InvalidDocument, "m:patch", {"fields": {"nickname": "a"}}, "nickname", "a"),
        (UniqueViolation, "m:patch", {"fields": {"name": "ann"}}, "name", "ann"),
    ],
)
async def test_a_violation_says_table_field_and_value(
    tmp_path: Path, error: type[ConstraintViolation], path: str, arguments: dict[str, Any], field: str, value: Any
) -> None:
    async with open_app(tmp_path, FUNCTIONS, schema=SCHEMA) as app:
        await app.call("m:add_user", name="ann")
        other = await app.call("m:add_user", name="eve")
        if path == "m:patch":
            arguments = {"id": other, **arguments}
        with pytest.raises(ConstraintViolation) as violated:
            await app.call(path, **arguments)
        assert type(violated.value) is error
        assert (violated.value.table, violated.value.field, violated.value.value) == ("users", field, value)


async def test_a_violation_of_several_fields_says_all_of_them(tmp_path: Path) -> None:
    async with open_app(tmp_path, FUNCTIONS, schema=SCHEMA) as app:
        post = await app.call("m:add_post", game=await app.call("m:add_game"))
        user = await app.call("m:add_user", name="ann")
        await app.call("m:add_vote", post=post, user=user)
        with pytest.raises(UniqueViolation) as violated:
            await app.call("m:add_vote", post=post, user=user)
        error = violated.value
        assert (error.index, error.values) == ("by_post_user", {"post_id": post, "user_id": user})
        assert (error.table, error.field, error.value) == ("votes", "user_id", user)


async def test_a_function_may_catch_a_violation_and_tell_its_client_and_nothing_is_half_done(tmp_path: Path) -> None:
    functions = """
        @mutation
        async def sign_up(ctx, name: str) -> str:
            try:
                return await ctx.db.insert(User(name=name))
            except ConstraintViolation as error:
                raise AppError({"field": error.field, "taken": isinstance(error, UniqueViolation)}) from None

        @mutation
        async def delete_or_rename(ctx, id: Id[User]) -> list[str]:
            try:
                await ctx.db.delete(id)
            except ForeignKeyViolation:
                await ctx.db.patch(id, name="gone")
            return [user.name async for user in ctx.db.query(User)]
    """
    async with open_app(tmp_path, code(FUNCTIONS, functions), schema=SCHEMA, mode="production") as app:
        user = await app.call("m:sign_up", name="ann")
        assert (await app.failure("m:sign_up", name="")).data == b'{"field":"name","taken":false}'
        assert (await app.failure("m:sign_up", name="ann")).data == b'{"field":"name","taken":true}'
        post = await app.call("m:add_post", game=await app.call("m:add_game"), user=user)
        await app.call("m:add_vote", post=post, user=user)
        assert await app.call("m:delete_or_rename", id=user) == ["gone"]
        assert (await app.call("m:post", id=post)).user_id == user  # it was not let go of either


async def test_in_production_a_client_is_told_nothing_of_the_tables(tmp_path: Path) -> None:
    async with open_app(tmp_path, FUNCTIONS, schema=SCHEMA, mode="production") as app:
        await app.call("m:add_user", name="ann")
        failure = await app.failure("m:add_user", name="ann")
        assert failure.code == "UniqueViolation"
        assert "users" not in failure.message
    async with open_app(tmp_path, schema=SCHEMA) as app:
        assert (
            "users.by_name: a document with {'name': 'ann'} is there"
            in (await app.failure("m:add_user", name="ann")).message
        )


# -- foreign keys


async def test_subscribers_of_children_are_told_of_a_cascade_and_others_are_not(tmp_path: Path) -> None:
    async with open_app(tmp_path, FUNCTIONS, schema=SCHEMA) as app:
        game, other = await app.call("m:add_game"), await app.call("m:add_game")
        post = await app.call("m:add_post", game=game, text="a")
        await app.call("m:add_vote", post=post)
        other_post = await app.call("m:add_post", game=other, text="b")
        async with (
            app.watched("m:posts", game=game) as posts,
            app.watched("m:votes", post=post) as votes,
            app.watched("m:post", id=post) as one,
            app.watched("m:posts", game=other),
            app.watched("m:votes", post=other_post),
        ):
            await app.call("m:delete", id=game)
            assert (await anext(posts), await anext(votes), await anext(one)) == ([], 0, None)
            await app.idle()
            assert [app.run_count(path) for path in ("m:posts", "m:votes", "m:post")] == [1, 1, 1]


async def test_subscribers_see_whom_a_document_no_longer_names(tmp_path: Path) -> None:
    async with open_app(tmp_path, FUNCTIONS, schema=SCHEMA) as app:
        user, game = await app.call("m:add_user", name="ann"), await app.call("m:add_game")
        post = await app.call("m:add_post", game=game, user=user)
        async with app.watched("m:post", id=post) as one:
            app.clock.advance(1)
            await app.call("m:delete", id=user)
            shown = await anext(one)
            assert shown.user_id is None
            assert shown.updated_at > shown.creation_time + 999


async def test_a_cascade_is_the_engines_own_and_no_policy_holds_it_up(tmp_path: Path) -> None:
    functions = """
        @policy(Game)
        class Games(Policy[None]):
            def read(self, game: Game) -> bool: return True
            def delete(self, game: Game) -> bool: return True

        @policy(Post)
        class Posts(Policy[None]):
            pass

        @query
        async def post_count(ctx) -> int:
            return await ctx.db.unrestricted.query(Post).count()

        @mutation
        async def make(ctx) -> str:
            game = await ctx.db.unrestricted.insert(Game())
            await ctx.db.unrestricted.insert(Post(game_id=game))
            return game
    """
    async with open_app(tmp_path, code(FUNCTIONS, functions), schema=SCHEMA) as app:
        ann = person("ann")
        game = await app.engine.mutation("m:make", identity=ann)
        assert await app.engine.query("m:post_count", identity=ann) == 1
        await app.engine.mutation("m:delete", id=game, identity=ann)
        assert await app.engine.query("m:post_count", identity=ann) == 0


async def test_the_engine_itself_cannot_break_a_foreign_key(tmp_path: Path) -> None:
    async with open_app(tmp_path, FUNCTIONS, schema=SCHEMA) as app:
        user = await app.call("m:add_user", name="ann")
        post = await app.call("m:add_post", game=await app.call("m:add_game"))
        await app.call("m:add_vote", post=post, user=user)

        def delete(transaction: WriteTransaction, now: float) -> None:
            transaction.delete(user)

        with pytest.raises(ForeignKeyViolation):
            await app.engine.backend.write(delete)


async def test_an_app_does_not_start_over_rows_that_break_a_new_foreign_key(tmp_path: Path) -> None:
    without = SCHEMA.replace('game = foreign_key("game_id", on_delete="cascade")', "")
    async with open_app(tmp_path, FUNCTIONS, schema=without) as app:
        game = await app.call("m:add_game")
        post = await app.call("m:add_post", game=game)
        await app.call("m:delete", id=game)
        with pytest.raises(SchemaError, match=rf"posts\.game_id: cannot be a foreign key, the row '{post}' names"):
            await app.rewrite(FUNCTIONS, schema=SCHEMA)
        assert (await app.call("m:post", id=post)).game_id == game  # the old code goes on
    with pytest.raises(SchemaError, match=r"posts\.game_id: cannot be a foreign key"):
        async with open_app(tmp_path, FUNCTIONS, schema=SCHEMA):
            pass
    async with open_app(tmp_path, FUNCTIONS, schema=without) as app:
        await app.call("m:delete", id=post)
        await app.rewrite(FUNCTIONS, schema=SCHEMA)
        assert app.engine.schema_changes == ["posts.game_id: foreign key added"]


# -- what the engine fills in


async def test_a_default_is_made_for_each_document(tmp_path: Path) -> None:
    async with open_app(tmp_path, FUNCTIONS, schema=SCHEMA) as app:
        game = await app.call("m:add_game")
        posts = [await app.call("m:post", id=await app.call("m:add_post", game=game)) for _ in range(2)]
        assert [post.tags for post in posts] == [[], []]
        assert posts[0].token != posts[1].token
        before = posts[0].token
        await app.call("m:patch", id=posts[0].id, fields={"text": "b"})
        assert (await app.call("m:post", id=posts[0].id)).token == before


async def test_a_factory_of_a_new_field_gives_each_old_document_its_own_value(tmp_path: Path) -> None:
    without = SCHEMA.replace("token: str = field(default_factory=lambda: uuid4().hex)", "")
    async with open_app(tmp_path, FUNCTIONS, schema=without) as app:
        game = await app.call("m:add_game")
        ids = [await app.call("m:add_post", game=game) for _ in range(3)]
        wanted = SCHEMA.replace("tags: list[str] = []", "tags: list[str] = []; by_token = unique('token')")
        await app.rewrite(FUNCTIONS, schema=wanted)
        assert len({(await app.call("m:post", id=post)).token for post in ids}) == 3


async def test_the_time_of_the_last_change_wakes_nobody_by_itself(tmp_path: Path) -> None:
    async with open_app(tmp_path, FUNCTIONS, schema=SCHEMA) as app:
        post = await app.call("m:add_post", game=await app.call("m:add_game"), text="a")
        made = await app.call("m:post", id=post)
        async with app.watched("m:post", id=post) as one:
            app.clock.advance(1)
            for fields in ({"text": "a"}, {"updated_at": 5.0}, {"text": "a", "updated_at": 5.0}):
                await app.call("m:patch", id=post, fields=fields)
                await app.idle()
                assert app.run_count("m:post") == 0
            await app.call("m:patch", id=post, fields={"text": "b", "updated_at": 5.0})
            changed = await anext(one)
            assert changed.updated_at > made.updated_at + 999
            assert msgspec.structs.replace(changed, updated_at=made.updated_at, text="a") == made


async def test_a_cascade_in_a_nested_mutation_is_undone_with_it(tmp_path: Path) -> None:
    functions = """
        @mutation
        async def delete_and_fail(ctx, game: Id[Game]) -> None:
            await ctx.db.delete(game)
            raise AppError("no")

        @mutation
        async def outer(ctx, game: Id[Game]) -> list[str]:
            try:
                await ctx.run_mutation(delete_and_fail, game=game)
            except AppError:
                return await ctx.run_query(posts, game=game)
    """
    async with open_app(tmp_path, code(FUNCTIONS, functions), schema=SCHEMA) as app:
        game = await app.call("m:add_game")
        await app.call("m:add_post", game=game, text="a")
        async with app.watched("m:posts", game=game):
            assert await app.call("m:outer", game=game) == ["a"]
            await app.idle()
            assert app.run_count("m:posts") == 0
