/* Preloaded into a program: delays its calls on files, or has them fail, as `inject` asks for. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <limits.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

static char operation[16], part[256];
static int code, milliseconds, left;

/* From now on the next `times` calls of `op` on paths that hold `where` (or end in it, if it ends in $) take `ms` longer
   and, unless `error` is 0, fail. */
void inject(const char *op, const char *where, int error, int times, int ms) {
  __atomic_store_n(&left, 0, __ATOMIC_SEQ_CST);
  snprintf(operation, sizeof operation, "%s", op);
  snprintf(part, sizeof part, "%s", where);
  code = error, milliseconds = ms;
  __atomic_store_n(&left, times, __ATOMIC_SEQ_CST);
}

/* How many of them are still to come. */
int remaining(void) { return left < 0 ? 0 : left; }

static int matches(const char *path) {
  size_t length = strlen(part), size = strlen(path);
  if (length && part[length - 1] == '$') return size >= length - 1 && !strncmp(path + size - length + 1, part, length - 1);
  return strstr(path, part) != NULL;
}

static int fails(const char *op, const char *path) {
  if (left <= 0 || strcmp(op, operation) || !matches(path)) return 0;
  if (__atomic_fetch_sub(&left, 1, __ATOMIC_SEQ_CST) <= 0) return 0;
  struct timespec pause = {milliseconds / 1000, milliseconds % 1000 * 1000000L};
  nanosleep(&pause, NULL);
  errno = code;
  return code != 0;
}

static int fails_at(const char *op, int fd) {
  if (left <= 0) return 0;
  char link[64], path[PATH_MAX];
  snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
  ssize_t size = readlink(link, path, sizeof path - 1);
  if (size < 0) return 0;
  path[size] = 0;
  return fails(op, path);
}

#define CALL(type, name, test, parameters, arguments)                        \
  type name parameters {                                                     \
    static type(*real) parameters;                                           \
    if (!real) real = (type(*) parameters)dlsym(RTLD_NEXT, #name);           \
    return test ? -1 : real arguments;                                       \
  }

CALL(ssize_t, write, fails_at("write", fd), (int fd, const void *from, size_t size), (fd, from, size))
CALL(ssize_t, writev, fails_at("write", fd), (int fd, const struct iovec *from, int count), (fd, from, count))
CALL(ssize_t, read, fails_at("read", fd), (int fd, void *to, size_t size), (fd, to, size))
CALL(ssize_t, pread, fails_at("read", fd), (int fd, void *to, size_t size, off_t at), (fd, to, size, at))
CALL(int, fsync, fails_at("fsync", fd), (int fd), (fd))
CALL(int, rename, fails("rename", path), (const char *path, const char *to), (path, to))
CALL(int, mkdir, fails("mkdir", path), (const char *path, mode_t mode), (path, mode))
