/* A storage that fails, or loses its power: preloaded (LD_PRELOAD) into a process, steered by variables of its environment.
 * For tests only.
 *
 *   IOF_MATCH     only files whose path contains this are touched; `-shm` and `.lock` never (they need not outlive a crash)
 *   IOF_CRASH_AT  the power is lost at the n-th operation (of IOF_CRASH_OP, or any)
 *   IOF_SEED      what becomes of each operation that was not synced then: kept, undone, or torn at a sector
 *   IOF_LAZY      a sync that lies: it is done when the next sync of that file comes
 *   IOF_FAIL_AT   the n-th operation (of IOF_FAIL_OP, or any) fails with IOF_ERRNO; with IOF_STICKY, all after it too
 *   IOF_FULL      while a file lies at this path, the disk is full: no file can grow
 *   IOF_FREE      a file lies at this path that says how many bytes of the disk are free
 *   IOF_TRACE     each operation is appended to this file: `sync engine.db-wal`
 *
 * Operations: open, read, write, sync, truncate, unlink, rename, mkdir.
 *
 * Invariants
 *   1. What may be undone is what POSIX does not promise yet: bytes and sizes until a sync of their file; names (of new,
 *      renamed and removed files, and of directories) until a sync of the directory that they are in.
 *   2. It undoes the newest first, so what is on disk then is a state that the disk could have been in.
 *   3. A file is known by device and inode, and kept open here: it may be closed and renamed before the crash.
 *
 * Not seen: writes by mmap (SQLite's `mmap_size` is 0).
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <libgen.h>
#include <limits.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <unistd.h>

#define SECTOR 512

typedef enum { BYTES, SIZE, CREATED, RENAMED, REMOVED, MADE } Kind;

typedef struct Undo {
  Kind kind;
  int is_half_synced; /* IOF_LAZY: the next sync makes it durable */
  struct Undo *next;  /* the one before it in time */
  /* BYTES, SIZE: */
  dev_t dev;
  ino_t ino;
  int fd;           /* of our own */
  off_t offset;     /* of `old` */
  off_t old_size;   /* of the file */
  size_t length;
  char *old, *new;  /* `old` is what was there, with zeros behind the end of the file */
  /* names: */
  char path[PATH_MAX], old_path[PATH_MAX]; /* RENAMED: from old_path; REMOVED: old_path is a link that keeps it */
} Undo;

static Undo *undo;
static long counts[9], total;
static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
static const char *NAMES[] = {"open", "read", "write", "sync", "truncate", "unlink", "rename", "mkdir"};
enum { OPEN, READ, WRITE, SYNC, TRUNCATE, UNLINK, RENAME, MKDIR };

#define REAL(type, name, ...) static type (*real_##name)(__VA_ARGS__)
REAL(int, open64, const char *, int, ...);
REAL(ssize_t, pread64, int, void *, size_t, off_t);
REAL(ssize_t, pwrite64, int, const void *, size_t, off_t);
REAL(ssize_t, write, int, const void *, size_t);
REAL(int, fsync, int);
REAL(int, fdatasync, int);
REAL(int, ftruncate64, int, off_t);
REAL(int, unlink, const char *);
REAL(int, rename, const char *, const char *);
REAL(int, mkdir, const char *, mode_t);
REAL(int, statvfs64, const char *, struct statvfs64 *);

__attribute__((constructor)) static void find_real(void) {
#define FIND(name) real_##name = dlsym(RTLD_NEXT, #name)
  FIND(open64); FIND(pread64); FIND(pwrite64); FIND(write); FIND(fsync); FIND(fdatasync);
  FIND(ftruncate64); FIND(unlink); FIND(rename); FIND(mkdir); FIND(statvfs64);
}

static long number(const char *name, long otherwise) {
  const char *text = getenv(name);
  return text ? atol(text) : otherwise;
}

static int ends_with(const char *text, const char *end) {
  size_t length = strlen(text), end_length = strlen(end);
  return length >= end_length && !strcmp(text + length - end_length, end);
}

static int matches(const char *path) {
  const char *wanted = getenv("IOF_MATCH");
  return wanted && !ends_with(path, "-shm") && !ends_with(path, ".lock") && strstr(path, wanted) != NULL;
}

static int path_of(int fd, char *path) {
  char link[64];
  snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
  ssize_t length = readlink(link, path, PATH_MAX - 1);
  if (length < 0) return 0;
  path[length] = 0;
  return 1;
}

static int is_tracked(int fd, char *path) { return getenv("IOF_MATCH") && path_of(fd, path) && matches(path); }

static void directory_of(const char *path, char *directory) {
  char copy[PATH_MAX];
  snprintf(copy, sizeof copy, "%s", path);
  snprintf(directory, PATH_MAX, "%s", dirname(copy));
}

/* -- the crash */

static void restore_bytes(Undo *u, unsigned *seed, int is_torn) {
  struct stat64 now;
  real_pwrite64(u->fd, u->old, u->length, u->offset);
  if (is_torn && u->kind == BYTES) {
    size_t kept = rand_r(seed) % (u->length / SECTOR + 1) * SECTOR;
    if (kept) real_pwrite64(u->fd, u->new, kept, u->offset);
    if (u->offset + (off_t)kept > u->old_size) u->old_size = u->offset + (off_t)kept;
  }
  off_t end = u->offset + (off_t)u->length;
  if (u->kind == BYTES && u->old_size < end && !fstat64(u->fd, &now) && now.st_size <= end)
    real_ftruncate64(u->fd, u->old_size);
}

static void restore_name(Undo *u) {
  char lost[PATH_MAX];
  switch (u->kind) {
    case CREATED: real_unlink(u->path); break;
    case RENAMED: real_rename(u->path, u->old_path); break;
    case REMOVED: real_rename(u->old_path, u->path); break;
    case MADE: /* with all that is in it; out of the way, as it need not be empty */
      snprintf(lost, sizeof lost, "%.4000s.lost-%d", u->path, (int)getpid());
      real_rename(u->path, lost);
      break;
    default: break;
  }
}

static void crash(void) {
  unsigned seed = (unsigned)number("IOF_SEED", 1);
  int is_all_lost = rand_r(&seed) % 4 == 0;
  for (Undo *u = undo; u; u = u->next) {
    int fate = is_all_lost ? 2 : rand_r(&seed) % 4; /* kept, torn, undone, undone */
    if (fate == 0) continue;
    if (u->kind == BYTES || u->kind == SIZE) restore_bytes(u, &seed, fate == 1);
    else restore_name(u);
  }
  for (Undo *u = undo; u; u = u->next)
    if (u->kind == REMOVED) real_unlink(u->old_path); /* if it is still there */
  kill(getpid(), SIGKILL);
  for (;;) pause();
}

/* -- counting, failing. The mutex is held from `begin` to `end`. */

static int is_at(const char *at, const char *only, int operation, int is_sticky) {
  long wanted = number(at, -1);
  const char *name = getenv(only);
  if (wanted < 0 || (name && strcmp(name, NAMES[operation]))) return 0;
  long count = name ? counts[operation] : total;
  return count == wanted || (is_sticky && count >= wanted);
}

/* Whether the operation is to fail; errno says how. */
static int begin(int operation, const char *path) {
  pthread_mutex_lock(&mutex);
  counts[operation]++;
  total++;
  const char *trace = getenv("IOF_TRACE");
  if (trace) {
    char line[PATH_MAX + 16];
    int length = snprintf(line, sizeof line, "%s %s\n", NAMES[operation], path);
    int fd = real_open64(trace, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600);
    if (fd >= 0) { real_write(fd, line, (size_t)length); close(fd); }
  }
  if (operation == SYNC && is_at("IOF_CRASH_AT", "IOF_CRASH_OP", SYNC, 0)) crash(); /* before it has done anything */
  if (is_at("IOF_FAIL_AT", "IOF_FAIL_OP", operation, number("IOF_STICKY", 0) != 0)) {
    if (real_write(1, "fault\n", 6) < 0) abort(); /* tells the test when */
    errno = (int)number("IOF_ERRNO", EIO);
    return 1;
  }
  return 0;
}

static void end(int operation) {
  if (operation != SYNC && is_at("IOF_CRASH_AT", "IOF_CRASH_OP", operation, 0)) crash();
  int kept = errno;
  pthread_mutex_unlock(&mutex);
  errno = kept;
}

long iof_operation_count(void) { return total; }

static int is_full(void) {
  const char *path = getenv("IOF_FULL");
  if (!path || access(path, F_OK)) return 0;
  errno = ENOSPC;
  return 1;
}

static int records(void) { return getenv("IOF_CRASH_AT") != NULL; }

static Undo *push(Kind kind) {
  Undo *u = calloc(1, sizeof *u);
  u->kind = kind;
  u->next = undo;
  undo = u;
  return u;
}

static int own_fd(dev_t dev, ino_t ino, const char *path) { /* invariant 3 */
  static struct { dev_t dev; ino_t ino; int fd; } files[1024];
  static int file_count;
  for (int i = 0; i < file_count; i++)
    if (files[i].dev == dev && files[i].ino == ino) return files[i].fd;
  if (file_count == 1024) abort();
  files[file_count].dev = dev;
  files[file_count].ino = ino;
  /* never closed: closing would drop SQLite's locks on it (POSIX) */
  return files[file_count++].fd = real_open64(path, O_RDWR | O_CLOEXEC);
}

static void record_bytes(Kind kind, int fd, const char *path, const void *new, size_t length, off_t offset) {
  struct stat64 now;
  if (!length || fstat64(fd, &now)) return;
  int own = own_fd(now.st_dev, now.st_ino, path);
  Undo *u = push(kind);
  u->dev = now.st_dev;
  u->ino = now.st_ino;
  u->fd = own;
  u->offset = offset;
  u->old_size = now.st_size;
  u->length = length;
  u->old = calloc(1, length);
  real_pread64(own, u->old, length, offset);
  if (new) { u->new = malloc(length); memcpy(u->new, new, length); }
}

static void record_name(Kind kind, const char *path, const char *old_path) {
  Undo *u = push(kind);
  if (!realpath(path, u->path)) snprintf(u->path, PATH_MAX, "%s", path);
  if (old_path) snprintf(u->old_path, PATH_MAX, "%s", old_path);
}

/* Forget what the sync of a file, or of a directory, makes durable. */
static void make_durable(int fd, const char *path) {
  struct stat64 now;
  int is_lazy = number("IOF_LAZY", 0) != 0;
  if (fstat64(fd, &now)) return;
  for (Undo **at = &undo; *at;) {
    Undo *u = *at;
    char directory[PATH_MAX];
    int is_meant;
    if (u->kind == BYTES || u->kind == SIZE) is_meant = u->dev == now.st_dev && u->ino == now.st_ino;
    else { directory_of(u->path, directory); is_meant = S_ISDIR(now.st_mode) && !strcmp(directory, path); }
    if (!is_meant || (is_lazy && !u->is_half_synced)) {
      u->is_half_synced |= is_meant;
      at = &u->next;
      continue;
    }
    if (u->kind == REMOVED) real_unlink(u->old_path);
    *at = u->next;
    free(u->old);
    free(u->new);
    free(u);
  }
}

/* -- what is put in the place of the C library's */

int open64(const char *path, int flags, ...) {
  va_list more;
  va_start(more, flags);
  mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(more, mode_t) : 0;
  va_end(more);
  if (!matches(path) || (flags & O_DIRECTORY)) return real_open64(path, flags, mode);
  int is_new = flags & O_CREAT && access(path, F_OK);
  int fd = -1;
  if (!begin(OPEN, path)) fd = real_open64(path, flags, mode);
  if (fd >= 0 && is_new && records()) record_name(CREATED, path, NULL);
  end(OPEN);
  return fd;
}
int open(const char *path, int flags, ...) {
  va_list more;
  va_start(more, flags);
  mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(more, mode_t) : 0;
  va_end(more);
  return open64(path, flags, mode);
}

ssize_t pread64(int fd, void *bytes, size_t length, off_t offset) {
  char path[PATH_MAX];
  if (!is_tracked(fd, path)) return real_pread64(fd, bytes, length, offset);
  ssize_t done = begin(READ, path) ? -1 : real_pread64(fd, bytes, length, offset);
  end(READ);
  return done;
}
ssize_t pread(int fd, void *bytes, size_t length, off_t offset) { return pread64(fd, bytes, length, offset); }

static ssize_t write_at(int fd, const char *path, const void *bytes, size_t length, off_t offset, int is_positioned) {
  struct stat64 now;
  ssize_t done = -1;
  int is_failing = begin(WRITE, path);
  if (!is_failing && !fstat64(fd, &now) && offset + (off_t)length > now.st_size && is_full()) is_failing = 1;
  if (!is_failing) {
    if (records()) record_bytes(BYTES, fd, path, bytes, length, offset);
    done = is_positioned ? real_pwrite64(fd, bytes, length, offset) : real_write(fd, bytes, length);
  }
  end(WRITE);
  return done;
}
ssize_t pwrite64(int fd, const void *bytes, size_t length, off_t offset) {
  char path[PATH_MAX];
  return is_tracked(fd, path) ? write_at(fd, path, bytes, length, offset, 1) : real_pwrite64(fd, bytes, length, offset);
}
ssize_t pwrite(int fd, const void *bytes, size_t length, off_t offset) { return pwrite64(fd, bytes, length, offset); }
ssize_t write(int fd, const void *bytes, size_t length) {
  char path[PATH_MAX];
  return is_tracked(fd, path) ? write_at(fd, path, bytes, length, lseek64(fd, 0, SEEK_CUR), 0)
                              : real_write(fd, bytes, length);
}

static int sync_with(int fd, int (*real)(int)) {
  char path[PATH_MAX];
  struct stat64 now;
  int is_directory = !fstat64(fd, &now) && S_ISDIR(now.st_mode);
  if (!getenv("IOF_MATCH") || !path_of(fd, path) || !(matches(path) || is_directory)) return real(fd);
  int result = begin(SYNC, path) ? -1 : real(fd);
  if (!result && records()) make_durable(fd, path);
  end(SYNC);
  return result;
}
int fsync(int fd) { return sync_with(fd, real_fsync); }
int fdatasync(int fd) { return sync_with(fd, real_fdatasync); }

int ftruncate64(int fd, off_t size) {
  char path[PATH_MAX];
  struct stat64 now;
  if (!is_tracked(fd, path)) return real_ftruncate64(fd, size);
  int result = -1;
  if (!begin(TRUNCATE, path)) {
    if (records() && !fstat64(fd, &now) && now.st_size > size)
      record_bytes(SIZE, fd, path, NULL, (size_t)(now.st_size - size), size);
    result = real_ftruncate64(fd, size);
  }
  end(TRUNCATE);
  return result;
}
int ftruncate(int fd, off_t size) { return ftruncate64(fd, size); }

int unlink(const char *path) {
  static int kept_count;
  char kept[PATH_MAX];
  if (!matches(path)) return real_unlink(path);
  int result = -1;
  if (!begin(UNLINK, path)) {
    int is_kept = 0;
    if (records()) {
      snprintf(kept, sizeof kept, "%.4000s.kept-%d", path, kept_count++);
      is_kept = !link(path, kept);
    }
    result = real_unlink(path);
    if (!result && is_kept) record_name(REMOVED, path, kept);
    else if (is_kept) real_unlink(kept);
  }
  end(UNLINK);
  return result;
}

int rename(const char *old_path, const char *path) {
  if (!matches(path)) return real_rename(old_path, path);
  int result = begin(RENAME, path) ? -1 : real_rename(old_path, path);
  if (!result && records()) record_name(RENAMED, path, old_path);
  end(RENAME);
  return result;
}

int mkdir(const char *path, mode_t mode) {
  if (!matches(path)) return real_mkdir(path, mode);
  int result = begin(MKDIR, path) ? -1 : real_mkdir(path, mode);
  if (!result && records()) record_name(MADE, path, NULL);
  end(MKDIR);
  return result;
}

int statvfs64(const char *path, struct statvfs64 *told) {
  int result = real_statvfs64(path, told);
  const char *told_by = getenv("IOF_FREE");
  char text[32] = "";
  int fd = told_by && !result ? real_open64(told_by, O_RDONLY | O_CLOEXEC) : -1;
  if (fd >= 0) {
    if (real_pread64(fd, text, sizeof text - 1, 0) > 0)
      told->f_bavail = told->f_bfree = (fsblkcnt64_t)atoll(text) / told->f_frsize;
    close(fd);
  }
  return result;
}
int statvfs(const char *path, struct statvfs *told) { return statvfs64(path, (struct statvfs64 *)told); }
