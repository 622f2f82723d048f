"""Checking credentials: from a token or an admin key to an identity.

providers    whom this engine trusts, and what makes such an entry sound
jwks         the public keys of a provider: parsed, fetched, cached
tokens       a signed token → a verified identity
admin        admin keys, the `Authorization` header, acting as somebody
development  a local issuer for made-up users
"""
