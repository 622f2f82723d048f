"""What a new database starts with: a few people, games and contents, and some chat."""

from msgspec import Struct

from engine import MutationCtx, mutation
from schema import ChatMessage, Content, Game, User

_HOUR_MS = 3_600_000.0


class _Line(Struct, frozen=True):
    """One chat message."""

    author: str  # the subject of its sender
    message: str
    seconds_ago: float


_CHAT = [
    _Line("tomas", "Anyone else watching from the train? 🚆", 540.0),
    _Line("aiko", "Living room, big screen, far too many snacks", 525.0),
    _Line("sam", "Welcome everyone, keep it friendly please", 510.0),
    _Line("tomas", "What a save by Okonkwo!!", 312.0),
    _Line("aiko", "how did he even see that coming", 304.0),
    _Line("maya", "Second half starts in five minutes. Enjoy the break!", 190.0),
    _Line("aiko", "Gulls need to press higher, the Pines walk through the middle", 95.0),
    _Line("tomas", "GOOOAL! 1-1, game on", 31.0),
    _Line("aiko", "told you 😄", 24.0),
]


@mutation(internal=True)
async def seed(ctx: MutationCtx, issuer: str = "https://development.localhost") -> bool:
    """Fill an empty database, and say whether it was: one that has users already is left alone.

    The people sign in at `issuer`, which `engine dev` plays itself, as maya (an admin), sam (moderates the chat),
    tomas and aiko.
    """
    if await ctx.db.query(User).first() is not None:
        return False
    author_by_subject = {}
    for subject, user in _people(issuer).items():
        user_id = await ctx.db.insert(user)
        author_by_subject[subject] = (user_id, user.name)
    for content in _contents():
        await ctx.db.insert(content)
    for game in _games(ctx.now):
        game_id = await ctx.db.insert(game)
        for line in _CHAT if game.status == "live" else ():
            user_id, user_name = author_by_subject[line.author]
            await ctx.db.insert(
                ChatMessage(
                    game_id=game_id,
                    user_id=user_id,
                    message=line.message,
                    user_name=user_name,
                    created_at=ctx.now - line.seconds_ago * 1000,
                )
            )
    return True


def _people(issuer: str) -> dict[str, User]:
    return {
        "maya": User(token_identifier=f"{issuer}|maya", name="Maya Okafor", role="admin"),
        "tomas": User(token_identifier=f"{issuer}|tomas", name="Tomás Rivera"),
        "aiko": User(token_identifier=f"{issuer}|aiko", name="Aiko Tanaka"),
        "sam": User(token_identifier=f"{issuer}|sam", name="Sam Whitfield", permissions=["write:chat"]),
    }


def _games(now: float) -> list[Game]:
    """Last night's, one that is on, and tomorrow's."""
    return [
        Game(
            title="Granite Bay Wolves at Lakeside Storm",
            league="Northern Hockey League",
            starts_at=now - 26 * _HOUR_MS,
            status="ended",
        ),
        Game(
            title="Harbor City Gulls at Northfield Pines",
            league="Coastal Soccer League",
            starts_at=now - _HOUR_MS,
            status="live",
        ),
        Game(title="Redwood Comets at Eastport Mariners", league="Pacific Hoops", starts_at=now + 24 * _HOUR_MS),
    ]


def _contents() -> list[Content]:
    return [
        Content(title="Wolves at Storm: full game", kind="replay", duration_seconds=8_940.0),
        Content(title="Wolves at Storm in ten minutes", kind="highlights", duration_seconds=604.0),
        Content(title="Ten Winters on the Lake", kind="documentary", duration_seconds=5_130.0),
        Content(title="Coach Lindqvist on the new season", kind="interview", duration_seconds=1_275.0),
    ]
