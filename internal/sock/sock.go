// Package sock is all that touches a descriptor: what differs from system to system is
// behind its doors, and nowhere else in the pool.
//
// Behind the doors are: which socket a descriptor is (Identify, Still), a look into it
// and a read from it without waiting (Peek, ReadNow), whether its close waits
// (Lingers), the options of a QoS (Options), how many files may be open and whether
// one more can be (FileLimit, NoFileFree), the system's numbers for errors (Err...,
// OutOfFiles, FullBacklog), and hearing that a peer hung up (Watcher). Where a system
// has no such thing the door says so (CanPeek, CanWatch, Options.Supported,
// HasAbstractUnix, a false beside the answer), and never does nothing in silence.
//
// Nothing here blocks, but for Watcher.Run, which is for a goroutine of its own. All
// else is a system call or a few that return at once; so is NoFileFree, which may stand
// behind a fork that is under way. Nothing here takes a lock of its own or runs foreign
// code, except the methods of a syscall.RawConn or a net.Conn that the caller passes.
// A descriptor is a number: whoever passes one keeps it open meanwhile, by calling from
// within Control of its syscall.RawConn.
//
// The zero ID is of no socket, or of one whose identity was never asked for. The zero
// Seen says that the peer is there and has sent nothing. The zero Options set nothing.
// A nil *Watcher watches nothing; a Watcher comes from NewWatcher only.
package sock

import (
	"errors"
	"syscall"
)

// Seen is what a look into a socket found.
type Seen struct {
	Bytes bool  // something waits to be read
	Err   error // io.EOF, or why the socket is no good
}

// OutOfFiles reports whether err says that the process or the system has no
// file handle left.
func OutOfFiles(err error) bool {
	return errors.Is(err, ErrProcessFiles) || errors.Is(err, ErrSystemFiles)
}

// FullBacklog reports whether err, of the dial of a Unix socket, says that the server
// does not accept fast enough. Linux says so at once; others wait.
func FullBacklog(err error) bool { return errors.Is(err, syscall.EAGAIN) }
