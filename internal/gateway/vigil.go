package gateway

import (
	"errors"
	"net"
	"sync/atomic"
	"syscall"
	"time"
)

// errLeft means that the client left while its request waited to be sent.
var errLeft = errors.New("the client left before its request was sent")

// vigilAfter is how long a request waits before a vigil begins: most requests wait for
// less, and their clients are checked once, right before the request is sent.
const vigilAfter = 50 * time.Millisecond

// A vigil watches a client from which nobody reads because its request waits: for the
// pool, for a connection of its own, or for a place. Without a vigil nobody would notice
// that the client has left, and its request would be carried out for nobody.
//
// A reset ends the wait. The end of the client's direction ends it only if fin is set,
// since "printf ... | nc" ends its direction and still wants the reply.
//
// Each client has one vigil and reuses it; a vigil is over before the next one begins.
type vigil struct {
	raw   net.Conn
	fin   bool
	end   func() // ends the wait
	begun time.Time
	timer *time.Timer
	done  chan struct{} // gets a value when the watch has ended

	stopped atomic.Bool
	left    atomic.Bool
}

// watchOver begins a vigil. The caller must stop the vigil before anybody reads from the
// client. If the client leaves, the vigil calls end, and the verdict is errLeft.
func (cl *client) watchOver(fin bool, end func()) *vigil {
	v := &cl.vigil
	v.fin, v.end, v.begun = fin, end, time.Now()
	v.left.Store(false)
	if _, ok := cl.raw.(syscall.Conn); !ok || !canWatch {
		v.stopped.Store(true)
		return v
	}
	v.stopped.Store(false)
	if v.timer == nil {
		v.raw, v.done = cl.raw, make(chan struct{}, 1)
		v.timer = time.AfterFunc(vigilAfter, v.watch)
	} else {
		v.timer.Reset(vigilAfter)
	}
	return v
}

func (v *vigil) watch() {
	defer func() { v.done <- struct{}{} }()
	rc, err := v.raw.(syscall.Conn).SyscallConn()
	if err != nil {
		return
	}
	// stop sets stopped before it sets its own deadline. So either stop's deadline
	// overwrites this one, or the read below sees stopped.
	v.raw.SetReadDeadline(time.Time{})
	rc.Read(func(fd uintptr) bool {
		if !v.stopped.Load() && hasLeft(fd, v.fin) {
			v.left.Store(true)
		}
		return v.stopped.Load() || v.left.Load()
	})
	if v.left.Load() {
		v.end()
	}
}

// stop ends the vigil and returns errLeft if the client has left.
func (v *vigil) stop() error {
	if !v.stopped.Swap(true) && !v.timer.Stop() {
		v.raw.SetReadDeadline(past)
		<-v.done
	}
	return v.verdict()
}

// sendable stops the vigil of a request that has waited and is about to be sent, and
// checks the client once more.
func (v *vigil) sendable() error {
	if v.stop() == nil && v.timer != nil && time.Since(v.begun) > time.Millisecond {
		if rc, err := v.raw.(syscall.Conn).SyscallConn(); err == nil {
			rc.Control(func(fd uintptr) {
				if hasLeft(fd, v.fin) {
					v.left.Store(true)
				}
			})
		}
	}
	return v.verdict()
}

func (v *vigil) verdict() error {
	if v.left.Load() {
		return errLeft
	}
	return nil
}

// isGone reports whether the client has reset its connection.
func (cl *client) isGone() (gone bool) {
	sc, ok := cl.raw.(syscall.Conn)
	if !ok || !canWatch {
		return false
	}
	if rc, err := sc.SyscallConn(); err == nil {
		rc.Control(func(fd uintptr) { gone = hasLeft(fd, false) })
	}
	return gone
}
