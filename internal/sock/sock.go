// Package sock holds everything that touches a descriptor. What differs between operating
// systems is in this package and nowhere else in the pool.
//
// It offers: the identity of a socket (Identify, Still), a look into a socket and a read
// from it without waiting (Peek, ReadNow), whether closing a socket waits (Lingers), the
// options of a QoS and a dial with them (Options), how many files may be open and whether one more can be
// (FileLimit, NoFileFree), the system's error numbers (Err..., OutOfFiles, FullBacklog),
// and notice of a peer's hang-up (Watcher). Where a system lacks one of these, the API
// reports it (CanPeek, CanWatch, Options.Supported, HasAbstractUnix, or a false beside
// the result); apart from ResetOnClose and Shutdown, nothing silently does nothing.
//
// Only Watcher.Run and Options.Dial block. Run needs a goroutine of its own. Every other function makes
// one or a few system calls that return at once; NoFileFree may also wait for a fork that
// is under way. This package takes no lock of its own and runs no foreign code, except
// the methods of a syscall.RawConn or a net.Conn that the caller passes. The caller must
// keep a descriptor open while it passes its number, by calling from within Control of
// its syscall.RawConn.
//
// The zero ID belongs to no socket, or to one that was never identified. The zero Seen
// means that the peer is there and has sent nothing. The zero Options set nothing. A nil
// *Watcher watches nothing; only NewWatcher makes a Watcher.
package sock

import (
	"errors"
	"syscall"
)

// Seen is what Peek found in a socket.
type Seen struct {
	Bytes bool  // data is waiting to be read
	Err   error // io.EOF, or the error that makes the socket unusable
}

// PeerWatcher is what a Watcher does, where the system has one (CanWatch). It reports at once
// when the peer of a connection hangs up, so that a dead idle connection leaves the pool
// without waiting for a loan or a sweep. One Watcher serves any number of connections, and
// needs one goroutine and one descriptor in all.
//
// By default arriving data is not reported, and costs nothing. Add and Rearm with data
// subscribe a connection to data as well, for one report each.
//
// A connection is added once, when it is dialed. The system forgets a connection when its
// socket is closed; one that leaves the pool and stays open must be removed with Remove.
//
// All methods may be called at the same time, also on a nil Watcher, which watches nothing,
// and with a nil RawConn, which has no descriptor. After Close they do nothing.
type PeerWatcher interface {
	// Run calls heard for each event, with the number of the descriptor, until Close. hungUp
	// means that the peer hung up or the socket failed; otherwise data has arrived. Run blocks
	// and calls heard on its own goroutine.
	Run(heard func(fd uintptr, hungUp bool))
	Add(rc syscall.RawConn, data bool) error
	Rearm(rc syscall.RawConn, data bool) error
	Remove(rc syscall.RawConn)
	Close()
}

var _ PeerWatcher = (*Watcher)(nil)

// OutOfFiles reports whether err means that the process or the system has no file handle
// left.
func OutOfFiles(err error) bool {
	return errors.Is(err, ErrProcessFiles) || errors.Is(err, ErrSystemFiles)
}

// FullBacklog reports whether err, from dialing a Unix socket, means that the server does
// not accept fast enough. Linux fails such a dial at once; other systems wait.
func FullBacklog(err error) bool { return errors.Is(err, syscall.EAGAIN) }
