"""The doors of the engine on the network, by aiohttp.

app          routes, cross-origin rules, starting and stopping
websocket    bytes ↔ session, and back-pressure
http         requests that ask once
"""
