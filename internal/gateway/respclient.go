package gateway

import (
	"context"
	"errors"

	"github.com/seed-ecb488c9/connpool"
)

// respClient is the additional state of a client of the framing resp.
type respClient struct {
	id   identity
	ctx  context.Context // carries id
	addr connpool.Addr   // the address of connections that match id
	line []byte          // an inline command, rewritten as an array
}

// serveRESP serves a client that speaks RESP. Each step takes a command and, if it leaves
// no state behind, the similar commands that arrived with it, and carries them out over
// one loan.
func (cl *client) serveRESP() {
	cl.become(identity{})
	var err error
	for err == nil {
		var frame []byte
		if frame, err = cl.next(cl.g.IdleTimeout); err == nil {
			err = cl.respStep(frame)
		}
	}
	cl.parted(err) // counted before the client can see the end
	cl.bidFarewell(err)
}

// errQuit is the end of a client that sent QUIT.
var errQuit = errors.New("the client said QUIT")

// respStep carries out the commands that begin with frame. frame is the one that in.take
// returned last.
func (cl *client) respStep(frame []byte) error {
	command, m, err := cl.read(frame)
	if err != nil {
		return err
	}
	switch m.class {
	case nothing:
		return nil
	case plain:
		cl.batch = append(cl.batch[:0], command)
		if len(command) == 0 || &command[0] != &frame[0] { // the command was rewritten, so it lies elsewhere
			return cl.exchange(cl.resp.ctx, cl.resp.addr, command)
		}
		size := len(frame)
		for len(cl.batch) < cl.g.Pipeline && size < batchBytes {
			more, ok, err := cl.in.take()
			if !ok || err != nil { // the next read finds the error again
				break
			}
			if more[0] != '*' || classify(more).class != plain {
				cl.in.untake(more)
				break
			}
			cl.batch = append(cl.batch, more)
			size += len(more)
		}
		return cl.exchange(cl.resp.ctx, cl.resp.addr, cl.in.store.b[cl.in.start-size:cl.in.start])
	case identifies:
		return cl.identify(command, m.verb)
	case local, refused:
		return cl.answer(m)
	}
	return cl.pinned(command, m)
}

// read returns the meaning of a frame, and the bytes to send. A command that came as a
// plain line is sent in the form that the gateway understood, so that the server cannot
// understand it differently.
func (cl *client) read(frame []byte) (command []byte, m meaning, err error) {
	if frame[0] == '*' {
		return frame, classify(frame), nil
	}
	args, err := splitInline(frame)
	if err != nil {
		return nil, m, err
	}
	if cap(cl.resp.line) > clientBuffer { // drops the buffer of an earlier, longer command
		cl.resp.line = nil
	}
	cl.resp.line = appendCommand(cl.resp.line[:0], args...)
	return cl.resp.line, classify(cl.resp.line), nil
}

// answer appends the gateway's own reply to a command that it does not pass on.
func (cl *client) answer(m meaning) error {
	cl.g.count.requests.Add(1)
	cl.g.count.replies.Add(1)
	end := error(nil)
	switch m.verb {
	case vQuit:
		cl.out.b = append(cl.out.b, "+OK\r\n"...)
		end = errQuit
	case vReset:
		cl.become(identity{})
		cl.out.b = append(cl.out.b, "+RESET\r\n"...)
	case vMaint: // the error text of Redis servers
		cl.out.b = append(cl.out.b, "-ERR unknown subcommand 'MAINT_NOTIFICATIONS'. Try CLIENT HELP.\r\n"...)
	case vSetinfo:
		cl.out.b = append(cl.out.b, "+OK\r\n"...)
	case vHTTP:
		return &malformed{"this is no web server"}
	default:
		cl.out.b = append(cl.out.b, "-ERR gateway: replication does not pass through it\r\n"...)
	}
	if err := cl.flush(); err != nil {
		return err
	}
	return end
}
