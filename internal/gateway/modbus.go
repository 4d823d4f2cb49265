package gateway

import (
	"encoding/binary"
	"fmt"
	"io"
)

// mbap is the header of Modbus/TCP: transaction id (2 bytes), protocol id (2,
// zero), length of what follows (2); and then, counted by it, unit (1),
// function (1) and data.
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

// modbus is one exchange. The transaction id is one of the connection's own on
// the way to the server, since ids of different clients may be equal, and the
// client's again on the way back. A reply with another id, unit or function
// than its request belongs to somebody else.
func (u *replies) modbus(c io.ReadWriter, request []byte, out *store, answered *int) error {
	client := binary.BigEndian.Uint16(request)
	u.tid++
	binary.BigEndian.PutUint16(request, u.tid)
	defer binary.BigEndian.PutUint16(request, client) // an exception is made from it
	if _, err := c.Write(request); err != nil {
		return err
	}
	mark := len(out.b)
	if err := u.next(c, out); err != nil {
		return err
	}
	reply := out.b[mark:]
	if tid := binary.BigEndian.Uint16(reply); tid != u.tid || reply[6] != request[6] || reply[7]&^0x80 != request[7]&^0x80 {
		err := &malformed{fmt.Sprintf("to transaction %d (unit %d, function %d) came transaction %d (unit %d, function %d)",
			u.tid, request[6], request[7], tid, reply[6], reply[7])}
		out.b = out.b[:mark]
		return err
	}
	binary.BigEndian.PutUint16(reply, client)
	*answered++
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
