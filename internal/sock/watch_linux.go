package sock

import (
	"os"
	"syscall"

	"golang.org/x/sys/unix"
)

// CanWatch says whether this system reports hang-ups without a goroutine for each
// connection.
const CanWatch = true

// Watcher is an epoll instance; sock.go says what it promises.
type Watcher struct {
	file *os.File
	raw  syscall.RawConn
}

// NewWatcher opens a descriptor, which Close closes. The caller must call Run or Close.
func NewWatcher() (*Watcher, error) {
	fd, err := unix.EpollCreate1(unix.EPOLL_CLOEXEC)
	if err != nil {
		return nil, os.NewSyscallError("epoll_create1", err)
	}
	// non-blocking, so that package os hands the descriptor to the runtime's poller
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
	return &Watcher{file: file, raw: raw}, nil
}

// Run waits in the runtime's poller; see PeerWatcher.
func (w *Watcher) Run(heard func(fd uintptr, hungUp bool)) {
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
			heard(uintptr(e.Fd), e.Events&^unix.EPOLLIN != 0)
		}
	}
}

// Close ends Run and closes the descriptor.
func (w *Watcher) Close() {
	if w != nil {
		w.file.Close()
	}
}

// Add begins to watch c. With data, the Watcher also reports data on c, once; see Rearm.
// Adding a connection that is watched already is no error and changes nothing.
func (w *Watcher) Add(c syscall.RawConn, data bool) error {
	err := w.control(c, data, unix.EPOLL_CTL_ADD)
	if err == unix.EEXIST { // both the goroutine that made the Watcher and the one that dialed may add it
		return nil
	}
	return err
}

// Rearm makes the Watcher report c again, including events that are pending. A connection
// that is watched for data is reported once and then not until the next Rearm: data that
// arrives during a loan would only wake the Watcher for nothing. The pool calls Rearm
// when the loan ends. An error means that c is not watched.
func (w *Watcher) Rearm(c syscall.RawConn, data bool) error {
	return w.control(c, data, unix.EPOLL_CTL_MOD)
}

// Remove stops watching c. It is for a connection that stays open.
func (w *Watcher) Remove(c syscall.RawConn) { w.control(c, false, unix.EPOLL_CTL_DEL) }

func (w *Watcher) control(c syscall.RawConn, data bool, op int) (err error) {
	if w == nil || c == nil {
		return nil
	}
	events := uint32(unix.EPOLLRDHUP | unix.EPOLLET)
	if data {
		events = unix.EPOLLRDHUP | unix.EPOLLIN | unix.EPOLLONESHOT
	}
	w.raw.Control(func(epfd uintptr) { // which keeps it from being closed meanwhile
		c.Control(func(fd uintptr) {
			err = unix.EpollCtl(int(epfd), op, int(fd), &unix.EpollEvent{Events: events, Fd: int32(fd)})
		})
	})
	return err
}
