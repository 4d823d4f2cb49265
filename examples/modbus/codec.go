package main

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"

	"github.com/seed-ecb488c9/connpool"
)

const (
	readHolding = 3
	writeSingle = 6
	failed      = 0x80 // set in the function code of an exception
	maxPDU      = 253
)

// exception is the answer of a device that cannot do what it was asked.
type exception byte

const (
	illegalFunction = exception(1)
	illegalAddress  = exception(2)
)

func (e exception) Error() string {
	switch e {
	case illegalFunction:
		return "modbus: illegal function"
	case illegalAddress:
		return "modbus: illegal data address"
	}
	return fmt.Sprintf("modbus: exception %d", byte(e))
}

// codec is the state of one connection: the number of its last transaction. It
// buffers nothing.
type codec struct {
	rw          io.ReadWriter
	transaction uint16
}

// ask sends a request and returns the part of the answer after the function code.
func (c *codec) ask(unit, function byte, body ...byte) ([]byte, error) {
	c.transaction++
	if err := send(c.rw, c.transaction, unit, append([]byte{function}, body...)); err != nil {
		return nil, err
	}
	transaction, from, pdu, err := receive(c.rw)
	switch {
	case err != nil:
		return nil, err
	case transaction != c.transaction || from != unit || pdu[0]&^failed != function:
		return nil, fmt.Errorf("modbus: the answer to transaction %d of unit %d came to %d of unit %d", transaction, from, c.transaction, unit)
	case pdu[0]&failed != 0 && len(pdu) == 2:
		return nil, connpool.Keep(exception(pdu[1]))
	case pdu[0]&failed != 0:
		return nil, errors.New("modbus: an exception without a code")
	}
	return pdu[1:], nil
}

func (c *codec) read(unit byte, register, count uint16) ([]uint16, error) {
	if count < 1 || count > 125 {
		return nil, connpool.Keep(fmt.Errorf("modbus: %d registers at once; it must be 1 to 125", count))
	}
	answer, err := c.ask(unit, readHolding, words(register, count)...)
	if err != nil {
		return nil, err
	}
	if len(answer) != 1+2*int(count) || int(answer[0]) != 2*int(count) {
		return nil, fmt.Errorf("modbus: %d bytes for %d registers", len(answer)-1, count)
	}
	values := make([]uint16, count)
	for i := range values {
		values[i] = binary.BigEndian.Uint16(answer[1+2*i:])
	}
	return values, nil
}

func (c *codec) write(unit byte, register, value uint16) error {
	answer, err := c.ask(unit, writeSingle, words(register, value)...)
	if err == nil && string(answer) != string(words(register, value)) {
		err = errors.New("modbus: the device confirms something else than was written")
	}
	return err
}

func words(all ...uint16) []byte {
	var b []byte
	for _, w := range all {
		b = binary.BigEndian.AppendUint16(b, w)
	}
	return b
}

// send writes a frame: transaction, protocol 0, length of the rest, unit, and the PDU.
func send(w io.Writer, transaction uint16, unit byte, pdu []byte) error {
	frame := append(words(transaction, 0, uint16(len(pdu)+1)), unit)
	_, err := w.Write(append(frame, pdu...))
	return err
}

func receive(r io.Reader) (transaction uint16, unit byte, pdu []byte, err error) {
	var head [7]byte
	if _, err := io.ReadFull(r, head[:]); err != nil {
		return 0, 0, nil, err
	}
	n := int(binary.BigEndian.Uint16(head[4:])) - 1
	if protocol := binary.BigEndian.Uint16(head[2:]); protocol != 0 || n < 1 || n > maxPDU {
		return 0, 0, nil, fmt.Errorf("modbus: protocol %d, %d bytes: this is no Modbus", protocol, n)
	}
	pdu = make([]byte, n)
	_, err = io.ReadFull(r, pdu)
	return binary.BigEndian.Uint16(head[:]), head[6], pdu, err
}

// plc is a device with registers.
type plc struct {
	mu        sync.Mutex // guards registers
	registers []uint16
	before    func() // called before each answer, if it is set
}

func newPLC(registers int) *plc { return &plc{registers: make([]uint16, registers)} }

func (p *plc) serve(nc net.Conn) {
	for {
		transaction, unit, pdu, err := receive(nc)
		if err != nil {
			return
		}
		answer := p.answer(pdu)
		if p.before != nil {
			p.before()
		}
		if err := send(nc, transaction, unit, answer); err != nil {
			return
		}
	}
}

func (p *plc) answer(pdu []byte) []byte {
	refuse := func(e exception) []byte { return []byte{pdu[0] | failed, byte(e)} }
	if len(pdu) != 5 {
		return refuse(illegalFunction)
	}
	register, n := int(binary.BigEndian.Uint16(pdu[1:])), int(binary.BigEndian.Uint16(pdu[3:]))
	p.mu.Lock()
	defer p.mu.Unlock()
	switch {
	case pdu[0] == readHolding && n >= 1 && n <= 125 && register+n <= len(p.registers):
		return append([]byte{readHolding, byte(2 * n)}, words(p.registers[register:register+n]...)...)
	case pdu[0] == writeSingle && register < len(p.registers):
		p.registers[register] = uint16(n)
		return pdu
	case pdu[0] == readHolding || pdu[0] == writeSingle:
		return refuse(illegalAddress)
	}
	return refuse(illegalFunction)
}
