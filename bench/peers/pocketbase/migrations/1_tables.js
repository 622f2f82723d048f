// The two collections that the bench writes and watches, on PocketBase as it ships. Their rules let everybody in: nobody
// signs in to the peers.
//
// Promised: a write is acknowledged when it is committed, and each record that is written is sent to all who watch its
// collection, or it. Not promised: that a commit is on the disk (its default is synchronous=NORMAL: the last writes may
// be gone after a loss of power), that a browser's list is the server's (it is kept by code of its own), exactly once.

migrate((app) => {
  const anybody = { listRule: "", viewRule: "", createRule: "", updateRule: "" };
  const text = (name) => ({ name, type: "text" });
  const number = (name) => ({ name, type: "number" });
  app.save(
    new Collection({
      type: "base",
      name: "messages",
      ...anybody,
      fields: [
        ...["game_id", "user_id", "message", "user_name", "user_avatar", "status"].map(text),
        number("created_at"),
      ],
      indexes: ["CREATE INDEX messages_by_game ON messages (game_id, created_at)"],
    }),
  );
  app.save(
    new Collection({
      type: "base",
      name: "progress",
      ...anybody,
      fields: [
        ...["user_id", "content_id", "device_type"].map(text),
        ...["duration_seconds", "completion_percentage", "last_watched_at", "position_seconds"].map(number),
        { name: "completed", type: "bool" },
      ],
      indexes: ["CREATE UNIQUE INDEX progress_by_user_content ON progress (user_id, content_id)"],
    }),
  );
});
