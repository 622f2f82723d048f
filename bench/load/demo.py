"""What the load needs to know of the demo app: who its users are, and the ids of its demo data."""

import aiohttp

from bench.load.processes import Server


def subjects(count: int) -> list[str]:
    """The names of that many users at the bench's issuer."""
    return [f"viewer-{number:04d}" for number in range(count)]


async def first_id(server: Server, path: str) -> str:
    """The id of the first document that a query lists."""
    body = {"path": path, "format": "convex_encoded_json", "args": {}}
    async with (
        aiohttp.ClientSession() as session,
        session.post(f"http://127.0.0.1:{server.port}/api/query", json=body) as response,
    ):
        answer = await response.json()
    if answer["status"] != "success" or not answer["value"]:
        raise RuntimeError(f"{path} lists nothing: {answer}")
    document_id: str = answer["value"][0]["_id"]
    return document_id
