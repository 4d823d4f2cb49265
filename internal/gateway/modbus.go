package gateway

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"time"

	"github.com/seed-ecb488c9/connpool"
)

// mbap is the header of Modbus/TCP: transaction id (2 bytes), protocol id (2, zero),
// length of the rest (2); the rest is unit (1), function (1) and data.
var mbap = LengthField{Offset: 4, Size: 2}

const (
	mbapLeast   = 8       // with unit and function, which every message has
	mbapLongest = 6 + 254 // by the specification
)

func newMBAPScanner() scanner {
	return &lengthScanner{field: mbap, max: mbapLongest, check: func(head []byte) error {
		if id := binary.BigEndian.Uint16(head[2:]); id != 0 {
			return &malformed{fmt.Sprintf("protocol id %d is not that of Modbus, which is 0", id)}
		}
		if n := int(binary.BigEndian.Uint16(head[4:])); n < mbapLeast-6 {
			return &malformed{fmt.Sprintf("a Modbus message of %d bytes after its length has no unit and function", n)}
		}
		return nil
	}}
}

// owed is a request that was given up without a reply. The reply may still come.
type owed struct {
	tid            uint16
	unit, function byte
}

const (
	maxOwed = 32 // remembered requests of one connection

	// maxSilent is how many requests in a row may time out before the connection is
	// closed: the device may be gone.
	maxSilent = 3
)

// errNoReply means that no reply came in time. A later reply is recognised by its number.
var errNoReply = fmt.Errorf("the device did not answer in time (%w)", os.ErrDeadlineExceeded)

// mutely reports whether a request has no reply by the specification: a broadcast, and
// "force listen only mode".
func mutely(request []byte) bool {
	return request[6] == 0 || len(request) >= 10 && request[7] == 8 && request[8] == 0 && request[9] == 4
}

// broadcastResponse returns the normal response to a write command that was broadcast;
// nil if the request is no broadcast or no write. Only a device can respond to another
// command.
func broadcastResponse(request []byte) []byte {
	if request[6] != 0 {
		return nil
	}
	switch request[7] {
	case 5, 6, 21, 22: // one coil, one register, a file record, a mask: the response repeats the request
		return request
	case 15, 16: // several coils or registers: the response has their address and quantity
		if len(request) < 12 {
			return nil
		}
		response := bytes.Clone(request[:12])
		binary.BigEndian.PutUint16(response[4:], 6) // counts unit, function, address, quantity
		return response
	}
	return nil
}

// asker is the part of a connection that an exchange needs.
type asker interface {
	io.ReadWriter
	SetReadDeadline(time.Time) error
	SetWriteDeadline(time.Time) error
}

// modbus carries out one exchange. The ids of different clients may be equal, so the
// request goes to the server with a transaction id of the connection's own, and the reply
// gets the client's id back. A reply with the id, unit and function of a request that was
// given up is dropped; a reply with any others belongs to somebody else and is an error.
// A device that always sends id 0 is accepted as long as it answers in time, or need not
// answer: a broadcast says which unit it was for.
//
// A client waits for a reply to a broadcast as to any other request, so it gets the
// normal response of the command as soon as the broadcast is over, unless BroadcastSilent
// is set.
func (u *replies) modbus(c asker, request []byte, out *store, answered *int, latest time.Time, cfg *Config) error {
	client := binary.BigEndian.Uint16(request)
	if u.tid++; u.tid == 0 {
		u.tid++
	}
	asked := owed{u.tid, request[6], request[7]}
	binary.BigEndian.PutUint16(request, u.tid)
	defer binary.BigEndian.PutUint16(request, client) // restored, because an exception reply is made from the request
	c.SetWriteDeadline(latest)
	if _, err := c.Write(request); err != nil {
		return err
	}
	end := latest
	if mutely(request) {
		end = earlier(end, time.Now().Add(cfg.BroadcastWait))
	}
	c.SetReadDeadline(end)
	mark := len(out.b)
	for {
		err := u.next(c, out)
		if errors.Is(err, os.ErrDeadlineExceeded) && !u.half && (!u.zero || mutely(request)) {
			u.owe(asked)
			if u.listened = true; mutely(request) {
				*answered++
				if cfg.BroadcastSilent {
					return nil
				}
				binary.BigEndian.PutUint16(request, client)
				return out.append(broadcastResponse(request))
			}
			if u.silent++; u.silent < maxSilent {
				return connpool.Keep(errNoReply)
			}
		}
		if err != nil {
			return err
		}
		came := owedBy(out.b[mark:])
		switch {
		case came == asked:
		case u.settle(came):
			out.b = out.b[:mark]
			continue
		case came.tid == 0 && came.unit == asked.unit && came.function == asked.function && !u.owes(asked) && (u.zero || !u.matched):
			u.zero = true
		default:
			out.b = out.b[:mark]
			return &malformed{fmt.Sprintf("to transaction %d (unit %d, function %d) came transaction %d (unit %d, function %d)",
				asked.tid, asked.unit, asked.function, came.tid, came.unit, came.function)}
		}
		u.silent, u.matched = 0, true
		binary.BigEndian.PutUint16(out.b[mark:], client)
		*answered++
		return nil
	}
}

// owedBy returns the request that a reply answers. An exception has the function of its
// request with the top bit set.
func owedBy(reply []byte) owed {
	return owed{binary.BigEndian.Uint16(reply), reply[6], reply[7] &^ 0x80}
}

// owe remembers a request that was given up.
func (u *replies) owe(o owed) {
	if len(u.owed) == maxOwed {
		u.owed = u.owed[:copy(u.owed, u.owed[1:])]
	}
	u.owed = append(u.owed, o)
}

// owes reports whether a reply without a number could belong to an earlier request that
// was given up, and not to asked.
func (u *replies) owes(asked owed) bool {
	for _, x := range u.owed {
		if x.unit == asked.unit && x.function == asked.function {
			return true
		}
	}
	return false
}

// settle reports whether o was owed, and removes o.
func (u *replies) settle(o owed) bool {
	for i, x := range u.owed {
		if x == o {
			u.owed = append(u.owed[:i], u.owed[i+1:]...)
			return true
		}
	}
	return false
}

// late is the pool's Push. Bytes that come while no request is in flight may be the reply
// to a request that was given up; anything else is an error.
func (g *Gateway) late(_ context.Context, c connpool.Conn) error {
	u := connpool.State[*replies](c)
	var reply store
	if err := u.next(c, &reply); err != nil {
		return err
	}
	if came := owedBy(reply.b); !u.settle(came) {
		return &malformed{fmt.Sprintf("transaction %d (unit %d, function %d) answers no request", came.tid, came.unit, came.function)}
	}
	return nil
}

// Exception codes of Modbus gateways.
const (
	modbusBusy        = 0x06 // server device busy
	modbusUnreachable = 0x0A // gateway path unavailable
	modbusNoResponse  = 0x0B // gateway target device failed to respond
)

func modbusException(_ *Config, dst, request []byte, why failure) []byte {
	code := byte(modbusNoResponse)
	switch why {
	case unreachable, speaks:
		code = modbusUnreachable
	case busy:
		code = modbusBusy
	}
	return append(dst, request[0], request[1], 0, 0, 0, 3, request[6], request[7]|0x80, code)
}
