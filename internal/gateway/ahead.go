package gateway

import (
	"sync/atomic"
	"time"
)

// aheadAfter is how long a write to a client takes before somebody looks whether
// the client is writing too.
const aheadAfter = 20 * time.Millisecond

// ahead reads what a client sends while the client does not read what it is
// sent. A client may write all of a long pipeline before it reads a single reply:
// then nobody but the gateway can give way. What is read waits in the client's
// store, within -max-memory. A client has one, which is used again.
type ahead struct {
	cl      *client
	timer   *time.Timer
	done    chan struct{} // gets a value when the reading has ended
	stopped atomic.Bool
	scratch []byte // for what is dropped
}

// begin makes a start before a write to the client, and end an end after it.
// Between the two nobody else may touch what the client has sent.
func (a *ahead) begin(cl *client) {
	a.stopped.Store(false)
	if a.timer == nil {
		a.cl, a.done = cl, make(chan struct{}, 1)
		a.timer = time.AfterFunc(aheadAfter, a.read)
	} else {
		a.timer.Reset(aheadAfter)
	}
}

func (a *ahead) read() {
	defer func() { a.done <- struct{}{} }()
	cl := a.cl
	// end says so before it sets its own deadline: either this one comes first
	// and is overwritten, or the question is answered yes.
	cl.conn.SetReadDeadline(time.Time{})
	for !a.stopped.Load() {
		switch err := cl.in.more(); err {
		case nil:
		case errNoMemory: // the rest is read all the same, or the client would not come to read why it is refused
			cl.in.broken = err
			fallthrough
		case cl.in.broken:
			if a.scratch == nil {
				a.scratch = make([]byte, clientBuffer)
			}
			if _, err := cl.in.r.Read(a.scratch); err != nil {
				return
			}
		default: // whoever reads next finds out why
			return
		}
		// Whoever writes is alive, and will come to read.
		cl.conn.SetWriteDeadline(time.Now().Add(cl.g.WriteTimeout))
	}
}

func (a *ahead) end() {
	a.stopped.Store(true)
	if !a.timer.Stop() {
		a.cl.conn.SetReadDeadline(past)
		<-a.done
	}
}
