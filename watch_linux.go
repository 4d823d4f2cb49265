package connpool

import (
	"log/slog"
	"os"
	"syscall"

	"golang.org/x/sys/unix"
)

// watcher hears at once when the peer of a connection hangs up, so that a dead
// idle connection leaves the pool without waiting for a loan or a sweep. It is
// one epoll instance for the whole pool, itself waited on through the runtime's
// poller: one goroutine and one descriptor, whatever the number of connections.
// It asks for the hang-up only, and for its edge, so data does not wake it; but for
// Push, see rearm.
//
// A connection is added once, when it is dialled. The kernel takes it out when
// its socket is closed, and detached connections are taken out by hand.
type watcher struct {
	file *os.File
	raw  syscall.RawConn
	fd   int
}

// startWatcher makes the pool's watcher. Without one (the system may refuse)
// the sweep has to do.
func (p *Pool) startWatcher() {
	w, err := newWatcher()
	if err != nil {
		p.log(slog.LevelWarn, "deaths of idle connections are found by the sweep only", "err", err)
		return
	}
	p.mu.Lock()
	if p.closed {
		p.mu.Unlock()
		w.close()
		return
	}
	p.watcher = w
	p.mu.Unlock()
	go p.watch(w)
}

func newWatcher() (*watcher, error) {
	fd, err := unix.EpollCreate1(unix.EPOLL_CLOEXEC)
	if err != nil {
		return nil, os.NewSyscallError("epoll_create1", err)
	}
	// Non-blocking is what makes package os hand it to the runtime's poller.
	if err := unix.SetNonblock(fd, true); err != nil {
		unix.Close(fd)
		return nil, os.NewSyscallError("fcntl", err)
	}
	file := os.NewFile(uintptr(fd), "epoll")
	raw, err := file.SyscallConn()
	if err != nil {
		file.Close()
		return nil, err
	}
	return &watcher{file, raw, fd}, nil
}

// watch passes on what the watcher hears, until it is closed.
func (p *Pool) watch(w *watcher) {
	events := make([]unix.EpollEvent, 64)
	for {
		n := 0
		err := w.raw.Read(func(fd uintptr) bool {
			n, _ = unix.EpollWait(int(fd), events, 0)
			return n > 0
		})
		if err != nil {
			break
		}
		for _, e := range events[:n] {
			if e.Events&^unix.EPOLLIN != 0 {
				p.hangUp(uintptr(e.Fd))
			} else {
				p.readable(uintptr(e.Fd))
			}
		}
	}
	p.mu.Lock()
	p.watcher = nil
	p.leftLocked()
	p.mu.Unlock()
}

func (w *watcher) close() {
	if w != nil {
		w.file.Close()
	}
}

// add begins to watch c. If the kernel refuses, the sweep has to do.
func (w *watcher) add(c *conn) { w.control(c, unix.EPOLL_CTL_ADD) }

// rearm makes it hear of c again, also of what there is already. A pool with a
// Push listens for data as well, and once: what arrives during a loan would wake
// it for nothing. Every time c is parked it is armed anew.
func (w *watcher) rearm(c *conn) { w.control(c, unix.EPOLL_CTL_MOD) }

// remove ends it, for a connection that lives on.
func (w *watcher) remove(c *conn) { w.control(c, unix.EPOLL_CTL_DEL) }

func (w *watcher) control(c *conn, op int) {
	if w == nil || c.probe.raw == nil {
		return
	}
	events := uint32(unix.EPOLLRDHUP | unix.EPOLLET)
	if c.site.pool.cfg.Push != nil && !c.site.tracked() {
		events = unix.EPOLLRDHUP | unix.EPOLLIN | unix.EPOLLONESHOT
	}
	w.raw.Control(func(epfd uintptr) { // which keeps it from being closed meanwhile
		c.probe.raw.Control(func(fd uintptr) {
			unix.EpollCtl(int(epfd), op, int(fd), &unix.EpollEvent{Events: events, Fd: int32(fd)})
		})
	})
}
