"""Who may see and change which row. Whatever function a client calls, it meets nothing else.

Games and contents are everybody's to read, and no function that clients call writes them. A stream session is
spoken for by whoever knows its secret id, and nothing lists them.
"""

from msgspec.structs import replace

from engine import Policy, policy
from functions.users import Viewer, is_admin, moderates_chat, viewer
from schema import ChatMessage, User, WatchProgress


@policy(User, viewer=is_admin)
class UserPolicy(Policy[bool]):
    """A user sees, changes and deletes their own row, but not what they may do; admins see and delete everybody's."""

    def read(self, user: User) -> bool:
        return self._is_own(user) or self.viewer

    def insert(self, user: User) -> bool:
        return self._is_own(user) and user.role == "user" and not user.permissions

    def update(self, old: User, new: User) -> bool:
        is_promotion = (old.role, old.permissions) != (new.role, new.permissions)
        return self._is_own(old) and self._is_own(new) and not is_promotion

    def delete(self, user: User) -> bool:
        return self.read(user)

    def _is_own(self, user: User) -> bool:
        return self.identity is not None and user.token_identifier == self.identity.token_identifier


@policy(WatchProgress, viewer=viewer)
class WatchProgressPolicy(Policy[Viewer]):
    """A user's own, and an admin's."""

    def read(self, progress: WatchProgress) -> bool:
        return progress.user_id == self.viewer.user_id or self.viewer.is_admin

    def insert(self, progress: WatchProgress) -> bool:
        return self.read(progress)

    def update(self, old: WatchProgress, new: WatchProgress) -> bool:
        return self.read(old) and old.user_id == new.user_id

    def delete(self, progress: WatchProgress) -> bool:
        return self.read(progress)


@policy(ChatMessage, viewer=moderates_chat)
class ChatMessagePolicy(Policy[bool]):
    """Everybody reads what is active, so all viewers of a game share a result, and all its moderators another one.

    Nobody edits a message: moderators change its status, and it goes with its author or its game.
    """

    def read(self, message: ChatMessage) -> bool:
        return message.status == "active" or self.viewer

    async def insert(self, message: ChatMessage) -> bool:
        author = await self.db.get(message.user_id)
        identity = self.identity
        return author is not None and identity is not None and author.token_identifier == identity.token_identifier

    def update(self, old: ChatMessage, new: ChatMessage) -> bool:
        return self.viewer and new == replace(old, status=new.status)
