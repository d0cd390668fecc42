/* Library for LD_PRELOAD in which the nth call of a kind fails, on files below one directory.

   Build: cc -shared -fPIC -O2 -o failing_calls.so failing_calls.c -ldl
   fail_call() arms it in this process and its later forks; the kind ALL counts the calls of every kind and fails none. What
   it has seen is in memory that forks share with the process that loaded it: calls_seen() counts the calls of a kind,
   failed_path() names the file that was hit. With the kind ALL, events() lists what a crash of the machine would need to
   know: `W`, inode and path of a file that was written to, `S` of one that was synced, `U` and the path of one that was
   removed, and `R` and both paths of one that was renamed. Each path ends with a zero byte. */
#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

/* In the order of commands.py's KINDS. */
enum { WRITE, FSYNC, RENAME, OPEN_WRITE, OPEN_READ, READ, MKDIR, UNLINK, MMAP, STAT, TRUNCATE, OPENDIR, CHMOD, LOCK, CLOSE, ALL };

/* Calls after the nth that fail as well: none, all of the kind, or those on the same file. */
enum { ONCE, LASTING, ON_THE_FILE };

static volatile int armed = -1, error_number, later, is_short;
static volatile long nth;
static char directory[PATH_MAX];
static struct { volatile long seen[ALL], noted; char failed[PATH_MAX], events[16 << 20]; } *shared;

__attribute__((constructor)) static void share(void) {
    shared = (void *)syscall(SYS_mmap, NULL, sizeof *shared, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
}

void fail_call(int kind, long n, int error, int later_calls, int half, const char *below) {
    snprintf(directory, sizeof directory, "%s/", below);
    nth = n; error_number = error; later = later_calls; is_short = half;
    memset((void *)shared->seen, 0, sizeof shared->seen); shared->failed[0] = 0; shared->noted = 0; armed = kind;
}
long calls_seen(int kind) { return shared->seen[kind]; }
const char *failed_path(void) { return shared->failed; }
const char *events(void) { return shared->events; }
long bytes_of_events(void) { return shared->noted; }

/* Absolute path of a file named relative to an open directory, or of an open file if path is NULL. */
static int full_path(int base, const char *path, char *out, size_t size) {
    char link[64];
    if (path && path[0] == '/') { snprintf(out, size, "%s", path); return 1; }
    if (base == AT_FDCWD) {
        if (syscall(SYS_getcwd, out, size) < 0) return 0;
    } else {
        snprintf(link, sizeof link, "/proc/self/fd/%d", base);
        ssize_t length = syscall(SYS_readlink, link, out, size - 1);
        if (length < 0) return 0;
        out[length] = 0;
    }
    if (path && *path) { size_t length = strlen(out); snprintf(out + length, size - length, "/%s", path); }
    return 1;
}

/* True if calls of this kind are counted. */
static int watches(int kind) { return armed == kind || armed == ALL; }

/* True if this call has to fail. */
static int fails(int kind, int base, const char *path) {
    if (!watches(kind)) return 0;
    char full[PATH_MAX];
    int kept = errno, found = full_path(base, path, full, sizeof full) && !strncmp(full, directory, strlen(directory));
    errno = kept;
    if (!found) return 0;
    long number = __sync_add_and_fetch(&shared->seen[kind], 1);
    if (armed == ALL || nth <= 0 || number < nth) return 0;
    if (number == nth) snprintf(shared->failed, sizeof shared->failed, "%s", full);
    return number == nth || later == LASTING || (later == ON_THE_FILE && !strcmp(full, shared->failed));
}

/* Add an event with one path, or two if `to` is not NULL, if the calls of all kinds are counted. */
static void note(char event, int base, const char *path, int to_base, const char *to) {
    if (armed != ALL) return;
    char text[2 * PATH_MAX + 32] = {event};
    int kept = errno;
    struct stat status;
    size_t start = 1;
    if (!path && !fstat(base, &status)) start += sprintf(text + 1, "%lu", (unsigned long)status.st_ino);
    if (full_path(base, path, text + start, PATH_MAX) && !strncmp(text + start, directory, strlen(directory))) {
        size_t size = strlen(text) + 1;
        if (to && full_path(to_base, to, text + size, PATH_MAX)) size += strlen(text + size) + 1;
        size_t at = __sync_fetch_and_add(&shared->noted, size);
        if (at + size > sizeof shared->events) abort();
        memcpy(shared->events + at, text, size);
    }
    errno = kept;
}

/* Result of a call, whose event is noted if it succeeded. */
static long noted(long result, char event, int base, const char *path) {
    if (result >= 0) note(event, base, path, 0, NULL);
    return result;
}
static int renamed(int result, int base, const char *from, int to_base, const char *to) {
    if (result >= 0) note('R', base, from, to_base, to);
    return result;
}

#define REAL(name) static __typeof__(&name) real; if (!real) real = dlsym(RTLD_NEXT, #name)
#define FAIL(kind, base, path, result) do { if (fails(kind, base, path)) { errno = error_number; return result; } } while (0)
#define NOTE_MAP do { if (fd >= 0 && (flags & MAP_SHARED) && (access & PROT_WRITE)) note('W', fd, NULL, 0, NULL); } while (0)
#define OPENS(flags) (((flags) & (O_CREAT | O_WRONLY | O_RDWR)) ? OPEN_WRITE : OPEN_READ)
#define MODE mode_t mode = 0; if (flags & (O_CREAT | O_TMPFILE)) { va_list rest; va_start(rest, flags); mode = va_arg(rest, mode_t); va_end(rest); }

ssize_t write(int fd, const void *data, size_t size) {
    REAL(write);
    if (fails(WRITE, fd, NULL)) {
        if (is_short && size > 1) return real(fd, data, size / 2);
        errno = error_number;
        return -1;
    }
    return noted(real(fd, data, size), 'W', fd, NULL);
}
ssize_t pwrite(int fd, const void *data, size_t size, off_t at) { REAL(pwrite); FAIL(WRITE, fd, NULL, -1); return noted(real(fd, data, size, at), 'W', fd, NULL); }
ssize_t pwrite64(int fd, const void *data, size_t size, off64_t at) { REAL(pwrite64); FAIL(WRITE, fd, NULL, -1); return noted(real(fd, data, size, at), 'W', fd, NULL); }
ssize_t writev(int fd, const struct iovec *parts, int count) { REAL(writev); FAIL(WRITE, fd, NULL, -1); return noted(real(fd, parts, count), 'W', fd, NULL); }
int fsync(int fd) { REAL(fsync); FAIL(FSYNC, fd, NULL, -1); return noted(real(fd), 'S', fd, NULL); }
int fdatasync(int fd) { REAL(fdatasync); FAIL(FSYNC, fd, NULL, -1); return noted(real(fd), 'S', fd, NULL); }
int rename(const char *from, const char *to) { REAL(rename); FAIL(RENAME, AT_FDCWD, from, -1); return renamed(real(from, to), AT_FDCWD, from, AT_FDCWD, to); }
int renameat(int base, const char *from, int to_base, const char *to) { REAL(renameat); FAIL(RENAME, base, from, -1); return renamed(real(base, from, to_base, to), base, from, to_base, to); }
int open(const char *path, int flags, ...) { MODE; REAL(open); FAIL(OPENS(flags), AT_FDCWD, path, -1); return real(path, flags, mode); }
int open64(const char *path, int flags, ...) { MODE; REAL(open64); FAIL(OPENS(flags), AT_FDCWD, path, -1); return real(path, flags, mode); }
int openat(int base, const char *path, int flags, ...) { MODE; REAL(openat); FAIL(OPENS(flags), base, path, -1); return real(base, path, flags, mode); }
int openat64(int base, const char *path, int flags, ...) { MODE; REAL(openat64); FAIL(OPENS(flags), base, path, -1); return real(base, path, flags, mode); }
ssize_t read(int fd, void *data, size_t size) { REAL(read); FAIL(READ, fd, NULL, -1); return real(fd, data, size); }
ssize_t pread(int fd, void *data, size_t size, off_t at) { REAL(pread); FAIL(READ, fd, NULL, -1); return real(fd, data, size, at); }
ssize_t pread64(int fd, void *data, size_t size, off64_t at) { REAL(pread64); FAIL(READ, fd, NULL, -1); return real(fd, data, size, at); }
int mkdir(const char *path, mode_t mode) { REAL(mkdir); FAIL(MKDIR, AT_FDCWD, path, -1); return real(path, mode); }
int mkdirat(int base, const char *path, mode_t mode) { REAL(mkdirat); FAIL(MKDIR, base, path, -1); return real(base, path, mode); }
int unlink(const char *path) { REAL(unlink); FAIL(UNLINK, AT_FDCWD, path, -1); return noted(real(path), 'U', AT_FDCWD, path); }
int unlinkat(int base, const char *path, int flags) { REAL(unlinkat); FAIL(UNLINK, base, path, -1); return noted(real(base, path, flags), 'U', base, path); }
int rmdir(const char *path) { REAL(rmdir); FAIL(UNLINK, AT_FDCWD, path, -1); return noted(real(path), 'U', AT_FDCWD, path); }
void *mmap(void *at, size_t size, int access, int flags, int fd, off_t from) { REAL(mmap); if (fd >= 0) FAIL(MMAP, fd, NULL, MAP_FAILED); NOTE_MAP; return real(at, size, access, flags, fd, from); }
void *mmap64(void *at, size_t size, int access, int flags, int fd, off64_t from) { REAL(mmap64); if (fd >= 0) FAIL(MMAP, fd, NULL, MAP_FAILED); NOTE_MAP; return real(at, size, access, flags, fd, from); }
int stat(const char *path, struct stat *out) { REAL(stat); FAIL(STAT, AT_FDCWD, path, -1); return real(path, out); }
int stat64(const char *path, struct stat64 *out) { REAL(stat64); FAIL(STAT, AT_FDCWD, path, -1); return real(path, out); }
int lstat(const char *path, struct stat *out) { REAL(lstat); FAIL(STAT, AT_FDCWD, path, -1); return real(path, out); }
int lstat64(const char *path, struct stat64 *out) { REAL(lstat64); FAIL(STAT, AT_FDCWD, path, -1); return real(path, out); }
int fstatat(int base, const char *path, struct stat *out, int flags) { REAL(fstatat); FAIL(STAT, base, path, -1); return real(base, path, out, flags); }
int fstatat64(int base, const char *path, struct stat64 *out, int flags) { REAL(fstatat64); FAIL(STAT, base, path, -1); return real(base, path, out, flags); }
int ftruncate(int fd, off_t size) { REAL(ftruncate); FAIL(TRUNCATE, fd, NULL, -1); return noted(real(fd, size), 'W', fd, NULL); }
int ftruncate64(int fd, off64_t size) { REAL(ftruncate64); FAIL(TRUNCATE, fd, NULL, -1); return noted(real(fd, size), 'W', fd, NULL); }
int posix_fallocate(int fd, off_t at, off_t size) { REAL(posix_fallocate); if (fails(TRUNCATE, fd, NULL)) return error_number; return real(fd, at, size); }
int posix_fallocate64(int fd, off64_t at, off64_t size) { REAL(posix_fallocate64); if (fails(TRUNCATE, fd, NULL)) return error_number; return real(fd, at, size); }
DIR *opendir(const char *path) { REAL(opendir); FAIL(OPENDIR, AT_FDCWD, path, NULL); return real(path); }
DIR *fdopendir(int fd) { REAL(fdopendir); FAIL(OPENDIR, fd, NULL, NULL); return real(fd); }
int chmod(const char *path, mode_t mode) { REAL(chmod); FAIL(CHMOD, AT_FDCWD, path, -1); return real(path, mode); }
int fchmod(int fd, mode_t mode) { REAL(fchmod); FAIL(CHMOD, fd, NULL, -1); return real(fd, mode); }
int flock(int fd, int operation) { REAL(flock); if (!(operation & LOCK_UN)) FAIL(LOCK, fd, NULL, -1); return real(fd, operation); }
int close(int fd) {
    REAL(close);
    if (watches(CLOSE) && fails(CLOSE, fd, NULL)) { real(fd); errno = error_number; return -1; }
    return real(fd);
}
