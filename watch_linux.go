package connpool

import (
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
	ctl  func(epfd, op, fd int, event *unix.EpollEvent) error // unix.EpollCtl, but for tests
}

const canWatch = true

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
	return &watcher{file: file, raw: raw, ctl: unix.EpollCtl}, nil
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
	p.unwatched(w)
}

func (w *watcher) close() {
	if w != nil {
		w.file.Close()
	}
}

// add begins to watch c.
func (w *watcher) add(c *conn) error { return w.control(c, unix.EPOLL_CTL_ADD) }

// rearm makes it hear of c again, also of what there is already. A pool with a
// Push listens for data as well, and once: what arrives during a loan would wake
// it for nothing. Every time c is parked it is armed anew.
func (w *watcher) rearm(c *conn) { w.control(c, unix.EPOLL_CTL_MOD) }

// remove ends it, for a connection that lives on.
func (w *watcher) remove(c *conn) { w.control(c, unix.EPOLL_CTL_DEL) }

func (w *watcher) control(c *conn, op int) (err error) {
	if w == nil || c.probe.raw == nil {
		return nil
	}
	events := uint32(unix.EPOLLRDHUP | unix.EPOLLET)
	if c.site.pool.cfg.Push != nil && !c.site.tracked() {
		events = unix.EPOLLRDHUP | unix.EPOLLIN | unix.EPOLLONESHOT
	}
	w.raw.Control(func(epfd uintptr) { // which keeps it from being closed meanwhile
		c.probe.raw.Control(func(fd uintptr) {
			err = w.ctl(int(epfd), op, int(fd), &unix.EpollEvent{Events: events, Fd: int32(fd)})
		})
	})
	if err == unix.EEXIST { // it was added twice, by who made the watcher and by who dialled
		return nil
	}
	return err
}
