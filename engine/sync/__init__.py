"""The sync protocol of the Convex clients: its messages, and one client's session. No socket in here.

protocol    the wire messages, and how results become frames
session     one client: messages in, frames and effects out
"""
