package sock

import (
	"os"
	"syscall"

	"golang.org/x/sys/unix"
)

// CanWatch says whether this system tells of a hang-up without a goroutine for each
// connection.
const CanWatch = true

// Watcher hears at once when the peer of a connection hangs up, so that a dead
// idle connection leaves the pool without waiting for a loan or a sweep. It is
// one epoll instance for any number of connections, itself waited on through the
// runtime's poller: one goroutine and one descriptor, whatever the number.
// It asks for the hang-up only, and for its edge, so data does not wake it; but for
// connections that are added, and armed, for data as well.
//
// A connection is added once, when it is dialled. The kernel takes it out when
// its socket is closed, and connections that live on are taken out by hand.
//
// All methods may be called at the same time, also on a nil Watcher, which watches
// nothing, and with a nil RawConn, which has no descriptor. After Close they do nothing.
type Watcher struct {
	file *os.File
	raw  syscall.RawConn
}

// NewWatcher needs a descriptor, which Close gives back. Whoever makes a Watcher calls
// Run, or Close.
func NewWatcher() (*Watcher, error) {
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
	return &Watcher{file: file, raw: raw}, nil
}

// Run calls heard for what the Watcher hears, with the number of the descriptor, until
// Close. hungUp says that the peer hung up or the socket failed, else there is data.
// Run blocks; it is for one goroutine, which is heard's, too.
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

// Close ends Run, and gives the descriptor back.
func (w *Watcher) Close() {
	if w != nil {
		w.file.Close()
	}
}

// Add begins to watch c. data: it is to hear of data as well, once, see Rearm. To add
// what is there already is no error, and changes nothing.
func (w *Watcher) Add(c syscall.RawConn, data bool) error {
	err := w.control(c, data, unix.EPOLL_CTL_ADD)
	if err == unix.EEXIST { // it was added twice, by who made the watcher and by who dialled
		return nil
	}
	return err
}

// Rearm makes it hear of c again, also of what there is already. Who listens for data
// as well is told once: what arrives while the connection is in use would wake it for
// nothing. Whoever is done with the connection arms it anew. The error says that c is
// not watched.
func (w *Watcher) Rearm(c syscall.RawConn, data bool) error {
	return w.control(c, data, unix.EPOLL_CTL_MOD)
}

// Remove ends it, for a connection that lives on.
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
