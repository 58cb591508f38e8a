/* Between the process and the kernel: counts the calls on a job's own files, writes each down, and breaks one of them.
 *
 * Loaded with LD_PRELOAD. It does nothing until `shim_plan` has been called, which tells it
 *
 *   watched   the job's own files, a line each: that very path, or that path with anything after a dot
 *   kind      what to do: see `enum kind`; "" to write down alone
 *   at        at which call, counted from 0 among those that the kind can do something to
 *   log       a descriptor that takes a line for each call, when it has returned or is never to return:
 *             name, path, second path, size (of an open: its flags), offset, result (or minus errno), what was done to it
 *
 * Paths of descriptors are asked of /proc each time: nothing is remembered that could be wrong.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

/* What a call is, for the question whether a kind applies to it. */
enum { READS = 0, ACTS = 1, NEEDS_ROOM = 2, WRITES = 4, CLOSES = 8 };

enum kind { NOTHING, BEFORE, AFTER, MIDDLE, SHORT, NO_SPACE, FULL, EIO_ONCE };
static const char *const kinds[] = {"", "before", "after", "middle", "short", "ENOSPC", "full", "EIO"};

static struct {
    int on, log;
    enum kind kind;
    long at, count;
    int full; /* from now on there is no room */
    char watched[4 * PATH_MAX];
} plan;

struct call {
    const char *name;
    int is;
    char path[PATH_MAX], other[PATH_MAX];
    long size, offset;
};

int shim_plan(const char *watched, const char *kind, long at, int log)
{
    if (strlen(watched) >= sizeof plan.watched)
        return -1;
    strcpy(plan.watched, watched);
    plan.at = at;
    plan.log = log;
    for (int number = 0; number < (int)(sizeof kinds / sizeof *kinds); number++)
        if (strcmp(kind, kinds[number]) == 0) {
            plan.kind = number;
            plan.on = 1;
            return 0;
        }
    return -1;
}

static int is_watched(const char *path)
{
    for (const char *own = plan.watched; *own != '\0';) {
        size_t length = strcspn(own, "\n");
        if (strncmp(path, own, length) == 0 && strchr(". ", path[length]) != NULL) /* "", ".partial", " (deleted)" */
            return 1;
        own += length + (own[length] == '\n');
    }
    return 0;
}

static void path_of(int descriptor, char *path)
{
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
    long length = syscall(SYS_readlinkat, AT_FDCWD, link, path, PATH_MAX - 1);
    path[length > 0 ? length : 0] = '\0';
}

static void absolute(int folder, const char *given, char *path)
{
    size_t length = 0;
    if (given[0] != '/') {
        if (folder == AT_FDCWD)
            syscall(SYS_getcwd, path, PATH_MAX);
        else
            path_of(folder, path);
        length = strlen(path);
        path[length++] = '/';
    }
    snprintf(path + length, PATH_MAX - length, "%s", given);
}

static void write_down(const struct call *call, long result, const char *done)
{
    char line[3 * PATH_MAX];
    int length = snprintf(line, sizeof line, "%s\t%s\t%s\t%ld\t%ld\t%ld\t%s\n", call->name, call->path, call->other,
                          call->size, call->offset, result, done);
    syscall(SYS_write, plan.log, line, (size_t)length);
}

static void die(void)
{
    syscall(SYS_kill, syscall(SYS_getpid), SIGKILL);
    for (;;)
        ;
}

static int applies(int is)
{
    switch (plan.kind) {
    case NOTHING: return 0;
    case EIO_ONCE: return 1;
    case BEFORE:
    case AFTER: return is & ACTS;
    case NO_SPACE: return is & NEEDS_ROOM;
    default: return is & WRITES;
    }
}

/* `a` to `d` are the arguments of the system call `number`; of one that WRITES, `c` is the size. */
static long perform(struct call *call, long number, long a, long b, long c, long d)
{
    if (!plan.on || !(is_watched(call->path) || is_watched(call->other)))
        return syscall(number, a, b, c, d);
    int hit = applies(call->is) && __atomic_fetch_add(&plan.count, 1, __ATOMIC_SEQ_CST) == plan.at;
    enum kind kind = hit ? plan.kind : NOTHING;
    int error = kind == EIO_ONCE ? EIO : kind == NO_SPACE ? ENOSPC : 0;
    if (plan.full && call->is & NEEDS_ROOM)
        error = ENOSPC;
    if (kind == BEFORE) {
        write_down(call, 0, kinds[BEFORE]);
        die();
    }
    if (kind == MIDDLE || kind == SHORT || kind == FULL)
        c = kind == MIDDLE ? c / 2 : (c + 1) / 2; /* a write that takes nothing is none */
    if (kind == FULL)
        plan.full = 1;
    long result = error && !(call->is & CLOSES) ? -1 : syscall(number, a, b, c, d);
    if (error) { /* a close that fails has closed all the same, as on Linux */
        result = -1;
        errno = error;
    }
    int kept = errno;
    write_down(call, result < 0 ? -kept : result, hit ? kinds[kind] : error ? kinds[FULL] : "");
    if (kind == AFTER || kind == MIDDLE)
        die();
    errno = kept;
    return result;
}

static long on_descriptor(const char *name, int is, int descriptor, long size, long offset, long number, long b, long c,
                          long d)
{
    struct call call = {.name = name, .is = is, .size = size, .offset = offset};
    call.path[0] = call.other[0] = '\0';
    if (plan.on)
        path_of(descriptor, call.path);
    return perform(&call, number, descriptor, b, c, d);
}

static long on_path(const char *name, int is, int folder, const char *path, long size, long number, long c, long d)
{
    struct call call = {.name = name, .is = is, .size = size, .offset = -1};
    call.path[0] = call.other[0] = '\0';
    if (plan.on)
        absolute(folder, path, call.path);
    return perform(&call, number, folder, (long)path, c, d);
}

static long renamed(int from, const char *path, int to, const char *target, unsigned flags)
{
    struct call call = {.name = "rename", .is = ACTS | NEEDS_ROOM, .size = flags, .offset = -1};
    call.path[0] = call.other[0] = '\0';
    if (!plan.on || flags)
        return syscall(SYS_renameat2, from, path, to, target, flags);
    absolute(from, path, call.path);
    absolute(to, target, call.other);
    return perform(&call, SYS_renameat, from, (long)path, to, (long)target);
}

static int opened(int folder, const char *path, int flags, mode_t mode)
{
    int changes = flags & (O_CREAT | O_TRUNC);
    return (int)on_path("open", ACTS | (changes ? NEEDS_ROOM : 0), folder, path, flags, SYS_openat, flags, mode);
}

#define MODE(last, mode) /* the variadic one of an open */ \
    mode_t mode = 0; \
    if (last & (O_CREAT | O_TMPFILE)) { \
        va_list rest; \
        va_start(rest, last); \
        mode = va_arg(rest, mode_t); \
        va_end(rest); \
    }

int open(const char *path, int flags, ...)
{
    MODE(flags, mode)
    return opened(AT_FDCWD, path, flags, mode);
}
int open64(const char *path, int flags, ...)
{
    MODE(flags, mode)
    return opened(AT_FDCWD, path, flags, mode);
}
int openat(int folder, const char *path, int flags, ...)
{
    MODE(flags, mode)
    return opened(folder, path, flags, mode);
}
int openat64(int folder, const char *path, int flags, ...)
{
    MODE(flags, mode)
    return opened(folder, path, flags, mode);
}
int close(int descriptor) { return (int)on_descriptor("close", ACTS | CLOSES, descriptor, 0, -1, SYS_close, 0, 0, 0); }

ssize_t read(int descriptor, void *data, size_t size)
{
    return on_descriptor("read", READS, descriptor, (long)size, -1, SYS_read, (long)data, (long)size, 0);
}
ssize_t pread(int descriptor, void *data, size_t size, off_t offset)
{
    return on_descriptor("pread", READS, descriptor, (long)size, offset, SYS_pread64, (long)data, (long)size, offset);
}
ssize_t pread64(int descriptor, void *data, size_t size, off64_t offset) { return pread(descriptor, data, size, offset); }

ssize_t write(int descriptor, const void *data, size_t size)
{
    return on_descriptor("write", ACTS | NEEDS_ROOM | WRITES, descriptor, (long)size, -1, SYS_write, (long)data,
                         (long)size, 0);
}
ssize_t pwrite(int descriptor, const void *data, size_t size, off_t offset)
{
    return on_descriptor("pwrite", ACTS | NEEDS_ROOM | WRITES, descriptor, (long)size, offset, SYS_pwrite64, (long)data,
                         (long)size, offset);
}
ssize_t pwrite64(int descriptor, const void *data, size_t size, off64_t offset)
{
    return pwrite(descriptor, data, size, offset);
}

int ftruncate(int descriptor, off_t size)
{
    return (int)on_descriptor("ftruncate", ACTS | NEEDS_ROOM, descriptor, size, -1, SYS_ftruncate, size, 0, 0);
}
int ftruncate64(int descriptor, off64_t size) { return ftruncate(descriptor, size); }
int fchmod(int descriptor, mode_t mode)
{
    return (int)on_descriptor("fchmod", ACTS, descriptor, mode, -1, SYS_fchmod, mode, 0, 0);
}
int fsync(int descriptor)
{
    return (int)on_descriptor("fsync", ACTS | NEEDS_ROOM, descriptor, 0, -1, SYS_fsync, 0, 0, 0);
}
int fdatasync(int descriptor)
{
    return (int)on_descriptor("fdatasync", ACTS | NEEDS_ROOM, descriptor, 0, -1, SYS_fdatasync, 0, 0, 0);
}

int fstat64(int descriptor, struct stat64 *found)
{
    return (int)on_descriptor("fstat", READS, descriptor, 0, -1, SYS_fstat, (long)found, 0, 0);
}
int lstat64(const char *path, struct stat64 *found)
{
    return (int)on_path("lstat", READS, AT_FDCWD, path, 0, SYS_newfstatat, (long)found, AT_SYMLINK_NOFOLLOW);
}

int rename(const char *path, const char *target) { return (int)renamed(AT_FDCWD, path, AT_FDCWD, target, 0); }
int renameat(int from, const char *path, int to, const char *target) { return (int)renamed(from, path, to, target, 0); }
int renameat2(int from, const char *path, int to, const char *target, unsigned flags)
{
    return (int)renamed(from, path, to, target, flags);
}

int unlink(const char *path) { return (int)on_path("unlink", ACTS, AT_FDCWD, path, 0, SYS_unlinkat, 0, 0); }
int rmdir(const char *path) { return (int)on_path("rmdir", ACTS, AT_FDCWD, path, 0, SYS_unlinkat, AT_REMOVEDIR, 0); }
int unlinkat(int folder, const char *path, int flags)
{
    return (int)on_path(flags & AT_REMOVEDIR ? "rmdir" : "unlink", ACTS, folder, path, 0, SYS_unlinkat, flags, 0);
}
int mkdir(const char *path, mode_t mode)
{
    return (int)on_path("mkdir", ACTS | NEEDS_ROOM, AT_FDCWD, path, mode, SYS_mkdirat, mode, 0);
}
